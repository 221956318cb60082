"""Offloaded optimizer state under Megatron-Core's distributed optimizer.

Megatron goes on to shard, reduce and measure gradients and to gather weights. What it steps is :class:`OffloadedShards`
in place of an AdamW: masters and moments of this rank's shards lie in
:class:`~pretrain.optim.offload.states.OffloadedStates`, and Megatron itself keeps no FP32 copy of anything.

For that Megatron is told that its inner optimizer holds the masters, as with ``use_precision_aware_optimizer`` and the
FusedAdam of Transformer Engine. It then never makes FP32 main parameters; the inner optimizer's parameters are flat
views of the weights inside Megatron's buffers, and their gradients, under ``decoupled_grad``, views of the reduced
gradients. Of that switch only the derived flag is set here: the setting itself wants Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.config.schema import Config, OffloadConfig, OptimizerConfig
from pretrain.engines.megatron_offload_contract import (
    GRADIENT_OF_SHARD,
    MASTERS_OUTSIDE,
    require_contract,
    unknown_megatron,
)
from pretrain.engines.megatron_state import LocalShare, MegatronState
from pretrain.optim.offload.choose import choose_device
from pretrain.optim.offload.states import GroupSettings, OffloadedStates
from pretrain.parallel.canonical import CanonicalParameter
from pretrain.parallel.late_compiler import optimizers_without_compiler


class OffloadedShards(torch.optim.AdamW):
    """The inner optimizer of Megatron's distributed optimizer: AdamW whose state is elsewhere.

    Its parameters are this rank's shards: flat views of weights. ``state`` stays empty. ``grad_scale`` is a factor on
    all gradients of the next step, which are never rewritten: the place of clipping.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimizerConfig) -> None:
        optimizers_without_compiler()
        betas = (config.betas[0], config.betas[1])
        super().__init__(groups, lr=config.learning_rate, betas=betas, eps=config.eps)
        self._offload: OffloadConfig = config.offload
        self.grad_scale = 1.0
        self.num_steps = 0
        self._is_early = False

    def place_states(self, masters: dict[Tensor, Tensor], device: torch.device) -> None:
        """Take masters and moments of the present parameters into their homes. Collective over the default group.

        Args:
            masters: initial FP32 values by parameter; of the others the parameter's own.
            device: the model's, which a rank that has no shard cannot tell from its parameters.

        Raises:
            ValueError: host memory does not suffice.
        """
        self._shards = [shard for group in self.param_groups for shard in group["params"]]
        groups = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        self.targets = {shard: number for number, shard in enumerate(self._shards)}
        self.states = OffloadedStates(
            [shard.detach() for shard in self._shards],
            groups,
            self._offload,
            gradient_dtype=torch.float32,
            masters=[masters.get(shard, shard).detach() for shard in self._shards],
            device=choose_device([torch.empty(0, device=device)], self._offload),
        )

    def early_start(self, num_microbatches: int) -> Callable[[Tensor], None]:
        """A function to be given the first chunk's output of each micro-batch in turn. State begins to be brought to
        the device with the backward pass of the last one, which is this rank's last: chunks go backward in reverse."""
        turns = iter(range(1, num_microbatches + 1))
        self._is_early = False

        def start(_: Tensor) -> None:
            self._is_early = True
            self.states.start_early()

        def given(output: Tensor) -> None:
            if next(turns) == num_microbatches and output.requires_grad:
                output.register_hook(start)

        return given

    def go_on_early(self, parameters: Iterable[Tensor]) -> None:
        """Bring more state whenever the last backward pass has come to one of ``parameters`` and set memory free."""

        def passed(_: Tensor) -> None:
            if self._is_early:
                self.states.advance_early()

        for parameter in parameters:
            parameter.register_hook(passed)

    def send_gradients(self) -> None:
        """Say that gradients are final: those wanted on the host start on their way, before their norm is known."""
        self._is_early = False
        for number, gradient in enumerate(self._gradients()):
            if gradient is not None:
                self.states.gradient_ready(number, gradient)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all shards, with their gradients times ``grad_scale``."""
        assert closure is None, "Megatron has the gradients ready"
        settings = [GroupSettings.of(group) for group in self.param_groups]
        self.states.update(self._gradients(), settings, self.num_steps + 1, self.grad_scale)
        self.num_steps += 1

    def _gradients(self) -> list[Tensor | None]:
        return [getattr(shard, GRADIENT_OF_SHARD, None) for shard in self._shards]


def offloaded_optimizer(config: Config) -> OptimizerConfig | None:
    """The optimizer's configuration if its state is offloaded."""
    choice = config.optimizer
    return choice if isinstance(choice, OptimizerConfig) and choice.offload.enabled else None


def clip_factor(grad_norm: float, max_norm: float) -> float:
    """Megatron's factor on gradients of this norm (``clip_grad_by_total_norm_fp32``); ``max_norm`` may be infinite."""
    factor = max_norm / (grad_norm + 1.0e-6)
    return factor if factor < 1.0 else 1.0


def leave_masters_outside(optimizer_config: Any) -> None:
    """Have a distributed optimizer of Megatron's ``OptimizerConfig`` keep no FP32 main parameters.

    Raises:
        RuntimeError: this Megatron-Core works in another way.
    """
    require_contract()
    setattr(optimizer_config, MASTERS_OUTSIDE, True)


def place_shards(
    state: MegatronState, masters: Sequence[dict[str, Tensor]] | None, device: torch.device
) -> OffloadedShards:
    """Give the shards of ``state``'s optimizer their offloaded state. Collective over the default group.

    Args:
        masters: initial FP32 values by module name, one mapping for each chunk (None: the weights').

    Raises:
        RuntimeError: Megatron-Core's optimizer holds other tensors than views of the weights.
        ValueError: host memory does not suffice.
    """
    shards = state.optimizer.optimizer
    if not isinstance(shards, OffloadedShards):
        raise unknown_megatron(f"the distributed optimizer steps {type(shards).__name__}, not the one it was given")
    for parameter, share in state.trained_shares():
        _check_view(parameter, share)
    shards.place_states({} if masters is None else state.initial_masters(masters), device)
    shards.go_on_early(parameter.tensor for parameter, _ in state.trained_shares())
    return shards


def _check_view(parameter: CanonicalParameter, share: LocalShare) -> None:
    """The share must lie in the parameter, or updates of it would be lost."""
    tensor, key = parameter.tensor, share.key
    expected = tensor.data_ptr() + share.start * tensor.element_size()
    if key.dtype != tensor.dtype or key.data_ptr() != expected or getattr(tensor, "main_param", None) is not None:
        raise unknown_megatron(
            f"the shard of {parameter.module_name} ({key.dtype}) is no view of the weight ({tensor.dtype})"
        )
