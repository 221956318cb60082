"""AdamW with offloaded state as a ``torch.optim.Optimizer``, for plain torch and DistributedDataParallel.

Under DistributedDataParallel every rank keeps the state of all weights, as with any torch optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.device import Device
from pretrain.optim.offload.schedule import Plan
from pretrain.optim.offload.states import SLOTS, GroupSettings, OffloadedStates


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose masters and moments live in host memory.

    Weights may be FP32, BF16 or FP16; 16-bit ones get an FP32 master. Results do not depend on ``offload``. A parameter
    without a gradient is left alone; the step count is that of all parameters together.

    ``step`` takes no closure that it calls more than once, and gradients are read when it runs: clip them before (any
    way), or give the factor as ``grad_scale``, or call :meth:`clip_grad_norm_`, which folds it into the update.

    Args:
        params: parameters or parameter groups, as for torch's AdamW. Groups cannot be added later.
        offload: fraction, subgroup size and the rest; ``enabled`` is not read here.
        device, plan: otherwise chosen for where the parameters are.

    Raises:
        ValueError: a parameter cannot be updated, or host memory does not suffice.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        offload: OffloadConfig | None = None,
        device: Device | None = None,
        plan: Plan | None = None,
    ) -> None:
        self._states: OffloadedStates | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        for number, parameter in enumerate(self._parameters):
            if not parameter.is_contiguous():
                raise ValueError(
                    f"parameter {number} of shape {tuple(parameter.shape)} is not contiguous in memory, expected that "
                    "of a whole tensor: make it parameter.data = parameter.data.contiguous() first"
                )
        self._states = OffloadedStates(
            [p.detach().view(-1) for p in self._parameters],
            numbers,
            offload or OffloadConfig(),
            gradient_dtype=self._parameters[0].dtype,
            device=device,
            plan=plan,
        )
        self._step = 0
        self._pending_scale = 1.0

    @property
    def states(self) -> OffloadedStates:
        """The state behind: plan, memory, timeline."""
        assert self._states is not None
        return self._states

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while constructing.

        Raises:
            ValueError: afterwards, because subgroups are cut and placed by then.
        """
        if self._states is not None:
            raise ValueError("offloaded state is cut into subgroups already: construct a new optimizer with all groups")
        super().add_param_group(param_group)

    def last_backward(self) -> None:
        """Call before the last backward pass of a step: state is brought to the device while it runs."""
        self.states.start_early()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The global 2-norm of the gradients; the next step scales them so that it is at most ``max_norm``.

        As ``torch.nn.utils.clip_grad_norm_``, but gradients stay as they are and no pass over them is made.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._pending_scale = min(1.0, max_norm / (float(norm) + 1e-6))
        return norm

    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float = 1.0) -> Any:
        """One update with ``gradient * grad_scale`` (and the factor of :meth:`clip_grad_norm_`)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, self._pending_scale = grad_scale * self._pending_scale, 1.0
        gradients = [None if p.grad is None else _flat(p.grad) for p in self._parameters]
        with torch.no_grad():
            self.states.update(
                gradients, [GroupSettings.of(group) for group in self.param_groups], self._step + 1, scale
            )
        self._step += 1
        return loss

    def skip_step(self) -> None:
        """Drop this step, for instance because gradients overflowed: nothing changes."""
        self._pending_scale = 1.0
        self.states.discard()

    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW (``step``, ``exp_avg``, ``exp_avg_sq`` by parameter), with ``master`` besides for weights
        that are not FP32. It says nothing of fractions, subgroups or places: any other may load it."""
        self.states.synchronize()
        packed = super().state_dict()
        packed["state"] = {
            number: {
                "step": torch.tensor(float(self._step)),
                **{
                    slot: self.states.read(number, slot).view(parameter.shape)
                    for slot in SLOTS
                    if slot != "master" or parameter.dtype != torch.float32
                },
            }
            for number, parameter in enumerate(self._parameters)
            if self._step
        }
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of this class, under any plan, or of torch's AdamW over the same parameters (load weights first).

        Raises:
            ValueError: it is that of other parameters; nothing was changed.
        """
        groups, state = state_dict["param_groups"], state_dict["state"]
        mine = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != mine:
            raise ValueError(f"groups of {[len(g['params']) for g in groups]} parameters, expected {mine}")
        steps = {float(entry["step"]) for entry in state.values()}
        if len(steps) > 1 or (steps and len(state) != len(self._parameters)):
            raise ValueError(
                f"state of {len(state)} of {len(self._parameters)} parameters at steps {sorted(steps)}, expected all "
                "at one step"
            )
        for number, parameter in enumerate(self._parameters):
            for slot in SLOTS:
                values = state.get(number, {}).get(slot)
                if values is not None and values.numel() != parameter.numel():
                    raise ValueError(
                        f"{slot} of parameter {number} has {values.numel()} elements, expected {parameter.numel()}"
                    )
        for group, other in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in other.items() if name != "params"})
        self._step = int(steps.pop()) if steps else 0
        self.states.reset()
        for number, parameter in enumerate(self._parameters):
            given = state.get(number, {})
            self.states.write(number, "master", given.get("master", parameter.detach()).reshape(-1))
            for slot in ("exp_avg", "exp_avg_sq"):
                if slot in given:
                    self.states.write(number, slot, given[slot].reshape(-1))


def _flat(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        raise ValueError("a gradient is sparse, expected a dense one: use sparse=False in the embedding")
    return gradient.detach().reshape(-1)
