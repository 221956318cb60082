"""Megatron-Core's process groups. Import Megatron-Core first (:mod:`pretrain.parallel.megatron_import`)."""

from __future__ import annotations

from typing import Any

import torch


def start_model_parallel(**sizes: Any) -> None:
    """Build the groups, after leaving those of an engine that this process had before.

    Args:
        sizes: arguments of ``parallel_state.initialize_model_parallel``.
    """
    from megatron.core import parallel_state

    leave_model_parallel()
    parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)


def leave_model_parallel() -> None:
    """Leave all groups, if there are any.

    Megatron only forgets them; a gloo group that is merely forgotten keeps threads that poll for ever.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
        parallel_state.destroy_model_parallel()
        for group in groups:
            torch.distributed.destroy_process_group(group)
