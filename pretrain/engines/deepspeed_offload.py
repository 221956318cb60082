"""Offloaded optimizer states in place of those that DeepSpeed keeps, ZeRO stages 1 to 3.

DeepSpeed goes on partitioning parameters, reducing gradients, measuring their norm and gathering weights. Masters and
moments are never created by it: :mod:`pretrain.engines.deepspeed_offload_zero` holds subclasses of its two ZeRO
optimizers whose update is :class:`ShardUpdate`. They rest on private methods, so the installed version and the
signatures of these methods are checked when they are used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.states import GroupSettings, OffloadedStates

TESTED: Final = ("0.19.8", "0.20")
"""Versions of DeepSpeed that the subclasses were tested with: from the first, below the second."""
OVERRIDDEN: Final[dict[str, dict[str, tuple[str, ...] | None]]] = {
    "engine.DeepSpeedEngine": {
        "_do_optimizer_sanity_check": ("basic_optimizer",),
        "_configure_zero_optimizer": ("optimizer",),
    },
    "zero.stage3.DeepSpeedZeroOptimizer_Stage3": {
        "_create_fp32_partitions": (),
        "initialize_optimizer_states": (),
        "reduce_ready_partitions_and_remove_grads": ("param",),
        "partition_grads": ("params_to_release", "grad_partitions"),
        "_prepare_sub_group": ("sub_group_id", "timer_names"),
        "unscale_and_clip_grads": ("sub_group_id", "total_norm"),
        "_optimizer_step": ("sub_group_id",),
        "_reassign_or_swap_out_partitioned_parameters": ("sub_group_id",),
        "_overflow_clean_up": ("prev_scale",),
    },
    "zero.stage_1_and_2.DeepSpeedZeroOptimizer": {
        "_configure_master_weights": None,
        "initialize_optimizer_states": (),
        "process_gradients": ("param", "i"),
        "copy_grads_in_partition": ("param", "group_idx"),
        "step": ("closure",),
    },
}
"""Methods that are overridden, by class of ``deepspeed.runtime``, with their parameters (None: any)."""
CALLED: Final[dict[str, dict[str, tuple[str, ...] | None]]] = {
    "zero.stage3.DeepSpeedZeroOptimizer_Stage3": {
        "is_gradient_accumulation_boundary": (),
        "get_param_id": ("param",),
    },
    "zero.stage_1_and_2.DeepSpeedZeroOptimizer": {
        "check_overflow": ("partition_gradients",),
        "scaled_global_norm": ("norm_type",),
        "zero_grad": ("set_to_none",),
        "is_gradient_accumulation_boundary": (),
        "_update_scale": ("has_overflow",),
        "_use_compact_grad_partition_buffer": ("group_idx",),
    },
}
"""Methods that overriding ones call."""
STEP_OF_STAGE_3: Final = (
    "_get_norm_groups",
    "_loss_scale_update_and_overflow_cleanup",
    "unscale_and_clip_grads",
    "_optimizer_step",
    "_reassign_or_swap_out_partitioned_parameters",
    "_post_step",
)
"""What DeepSpeed's step at stage 3 calls, in this order: the subclass leads it and does not repeat it."""


class Piece(NamedTuple):
    """``weight``: flat elements of ``parameter`` from ``start`` on, which this rank updates, as they lie on the device;
    ``group``: number of its parameter group."""

    parameter: nn.Parameter
    start: int
    weight: Tensor
    group: int


class ShardUpdate:
    """AdamW over the pieces of one rank, and its step count.

    Args:
        pieces: at most one of each parameter.
        groups: parameter groups with their present settings.
        masters: initial FP32 values of whole parameters, by ``id`` (those left out start from their weights).
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        groups: Callable[[], Sequence[dict[str, Any]]],
        config: OffloadConfig,
        masters: Mapping[int, Tensor],
    ) -> None:
        self.pieces = tuple(pieces)
        self.step = 0
        self._is_early = False
        self._groups = groups
        self._targets = {id(piece.parameter): number for number, piece in enumerate(self.pieces)}
        self._told: set[int] = set()
        self.states = OffloadedStates(
            [piece.weight for piece in self.pieces],
            [piece.group for piece in self.pieces],
            config,
            gradient_dtype=torch.float32,
            masters=[_master(piece, masters) for piece in self.pieces],
            apart=[getattr(piece.parameter, "keep_fp32", False) for piece in self.pieces],
        )

    def target(self, parameter: nn.Parameter) -> int | None:
        """Number of the target that holds this rank's piece of a parameter, None where it has none."""
        return self._targets.get(id(parameter))

    def passed(self) -> None:
        """The last backward pass of a step has made the gradient of a parameter: memory of activations is free."""
        if self._is_early:
            self.states.advance_early()
        else:
            self._is_early = True
            self.states.start_early()

    def ready(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """The step's gradient of this rank's piece is final: flat, at least as long as the piece (padding follows).

        Raises:
            RuntimeError: it was so before in the same step.
        """
        target = self.target(parameter)
        if target is None or not self.states.config.overlap:
            return
        if target in self._told:
            raise RuntimeError(
                f"a parameter of shape {tuple(getattr(parameter, 'ds_shape', parameter.shape))} was reduced twice in "
                "the last backward pass of a step, after its gradient had gone to the host; set "
                "optimizer.offload.overlap=false"
            )
        self._told.add(target)
        self.states.gradient_ready(target, gradient[: self.pieces[target].weight.numel()])

    def update(self, gradients: Sequence[Tensor], grad_scale: float) -> None:
        """One step; ``gradients``: flat, by piece, padding may follow."""
        own = [gradient[: piece.weight.numel()] for gradient, piece in zip(gradients, self.pieces, strict=True)]
        settings = [GroupSettings.of(group) for group in self._groups()]
        self.states.update(own, settings, self.step + 1, grad_scale)
        self._forget()
        self.step += 1

    def discard(self) -> None:
        """The step is dropped."""
        self._forget()
        self.states.discard()

    def _forget(self) -> None:
        self._told.clear()
        self._is_early = False


def _master(piece: Piece, masters: Mapping[int, Tensor]) -> Tensor:
    whole = masters.get(id(piece.parameter))
    return piece.weight if whole is None else whole.reshape(-1)[piece.start : piece.start + piece.weight.numel()]


def factor(norm: float, loss_scale: float, clip_norm: float) -> float:
    """What scaled gradients are multiplied with: DeepSpeed's clip factor over the loss scale. ``norm``: of the scaled
    gradients; ``clip_norm``: 0 clips nothing."""
    clip = max(1.0, (norm / loss_scale + 1e-6) / clip_norm) if clip_norm > 0 else 1.0
    return 1.0 / (clip * loss_scale)


@contextmanager
def offloading_engine() -> Iterator[None]:
    """Inside, ``deepspeed.initialize`` makes engines whose ZeRO optimizer is ours: the choice of a class, nothing else.

    Raises:
        RuntimeError: the installed DeepSpeed is not one that the classes were tested with.
    """
    require_tested_deepspeed()
    import deepspeed

    from pretrain.engines.deepspeed_offload_zero import OffloadingEngine, selected

    with selected(deepspeed, "DeepSpeedEngine", OffloadingEngine):
        yield


def require_tested_deepspeed() -> None:
    """Refuse a DeepSpeed that the subclasses were not tested with.

    Raises:
        RuntimeError: its version, or every method that differs.
    """
    import deepspeed
    from packaging.version import Version

    first, limit = TESTED
    problems = []
    if not Version(first) <= Version(deepspeed.__version__) < Version(limit):
        problems.append(f"its version is {deepspeed.__version__}")
    problems += contract_violations()
    if problems:
        raise RuntimeError(
            f"optimizer.offload overrides private methods of DeepSpeed and was tested with {first} up to, but without, "
            f"{limit}; of the installed one {'; '.join(problems)}; install the version in constraints.txt, or set "
            "optimizer.offload.enabled=false"
        )


def contract_violations() -> list[str]:
    """What the installed DeepSpeed does not have as the subclasses need it."""
    import deepspeed.runtime.engine
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2

    found = []
    for table in (OVERRIDDEN, CALLED):
        for path, methods in table.items():
            owner: Any = deepspeed.runtime
            for name in path.split("."):
                owner = getattr(owner, name)
            for name, expected in methods.items():
                method = getattr(owner, name, None)
                if method is None:
                    found.append(f"{path} has no {name}")
                    continue
                has = tuple(inspect.signature(_undecorated(method)).parameters)[1:]
                if expected is not None and has != expected:
                    found.append(f"{path}.{name} takes ({', '.join(has)}), expected ({', '.join(expected)})")
    stage_3 = deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    called = [name for name in _undecorated(stage_3.step).__code__.co_names if name in STEP_OF_STAGE_3]
    if tuple(called) != STEP_OF_STAGE_3:
        found.append(f"its step at stage 3 calls {', '.join(called)}, expected {', '.join(STEP_OF_STAGE_3)}")
    return found


def _undecorated(method: Any) -> Any:
    """``method`` as it was written. DeepSpeed's ``instrument_w_nvtx`` keeps what it wraps in its closure only."""
    method = inspect.unwrap(method)
    if method.__name__ != "wrapped_fn":
        return method
    return next(_undecorated(cell.cell_contents) for cell in method.__closure__ if callable(cell.cell_contents))
