"""Importing DeepSpeed without its side effects.

On a CPU host DeepSpeed compiles a shared-memory communication operator when the process group starts: 43 s cold, and an
error without a C++ compiler or ``ninja``. It asks ``deepspeed.ops.__compatible_ops__`` first, and computes that table
on first access; presetting it to "nothing is available" keeps every compile-at-first-use operator switched off.

Its autotuner, which nobody here asks for, imports MLflow, and its Muon torch's compiler: together more than half of
what the import costs. The one is left out, the other put off.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

from pretrain.parallel.late_compiler import compiled_at_first_call

_AUTOTUNER = "deepspeed.autotuning.autotuner"


def import_deepspeed(device_type: str) -> Any:
    """The ``deepspeed`` module, quiet, with compile-at-first-use operators off on CPU hosts."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    with warnings.catch_warnings(), _without_autotuner(), compiled_at_first_call():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops

        with contextlib.suppress(ImportError):  # of a release without it
            import deepspeed.runtime.zero.muon.original_muon
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # torch renamed the collectives that ZeRO calls in every step, and would say so as often.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device_type == "cpu":
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed


@contextlib.contextmanager
def _without_autotuner() -> Iterator[None]:
    if _AUTOTUNER in sys.modules or "deepspeed" in sys.modules:
        yield
        return
    absent = types.ModuleType(_AUTOTUNER)
    absent.Autotuner = None  # type: ignore[attr-defined]
    sys.modules[_AUTOTUNER] = absent
    try:
        yield
    finally:
        sys.modules.pop(_AUTOTUNER, None)
