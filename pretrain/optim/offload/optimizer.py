"""AdamW with offloaded state as a ``torch.optim.Optimizer``, for plain torch and DistributedDataParallel.

Under DistributedDataParallel every rank keeps the state of all weights, as with any torch optimizer.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.device import Clock, Device
from pretrain.optim.offload.optimizer_checks import (
    MOMENTS,
    entry_faults,
    few,
    foreign_faults,
    gradient_dtype,
    is_rounded,
    parameter_faults,
    setting_faults,
    tensors_of,
)
from pretrain.optim.offload.schedule import Plan
from pretrain.optim.offload.states import GroupSettings, OffloadedStates
from pretrain.parallel.process import world_size


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose masters and moments live in host memory.

    Weights may be FP32, BF16 or FP16; 16-bit ones get an FP32 master. Results do not depend on ``offload``. A parameter
    without a gradient is left alone; the step count is that of all parameters together.

    ``step`` takes no closure that it calls more than once, and gradients are read when it runs: clip them before (any
    way), or give the factor as ``grad_scale``, or call :meth:`clip_grad_norm_`, which folds it into the update.
    ``torch.amp.GradScaler`` works as with torch's optimizers; without ``unscale_`` its factor is folded in, too.

    The master decides what a 16-bit weight is. Load weights before constructing this, or call :meth:`take_weights`
    after: otherwise the next step would undo what was loaded. It raises instead where torch counted the write, which
    it does not for writes through ``parameter.data``.

    ``state`` has, as torch's, ``step``, ``exp_avg`` and ``exp_avg_sq`` of each parameter, and ``master`` of 16-bit
    ones: copies on the host, made when they are asked for.

    Args:
        params: parameters or parameter groups, as for torch's AdamW. Groups cannot be added later.
        offload: fraction, subgroup size and the rest; ``enabled`` is not read here.
        device, plan: otherwise chosen for where the parameters are.
        early_gradients: after :meth:`last_backward`, send gradients to the host as the backward pass makes them. Only
            where they are final by then: by one process alone (not under DistributedDataParallel) and not rewritten
            before ``step``. Those that were, are sent again, with a warning, which costs the time that this saves; not
            seen are writes through ``parameter.grad.data``. :meth:`clip_grad_norm_` rewrites none.
        watch: on a GPU, measure steps and plan anew when rates drift (``offload.replan_interval``).

    Raises:
        ValueError: settings or parameters that are impossible, all named; host memory does not suffice.
    """

    # GradScaler calls step() also after an overflow, and leaves its scale in ``grad_scale`` and ``found_inf``.
    _step_supports_amp_scaling = True

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
        early_gradients: bool = False,
        watch: bool = True,
    ) -> None:
        self._states: OffloadedStates | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        faults = [*setting_faults(self.param_groups), *parameter_faults(self._parameters)]
        if faults:
            raise ValueError("\n".join(faults))
        self._early_gradients = early_gradients
        self._check_alone()
        numbers = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        self._states = OffloadedStates(
            # Unlike detach(), data counts versions of its own: what changes those of parameters is not the update.
            [p.data.view(-1) for p in self._parameters],
            numbers,
            offload or OffloadConfig(),
            gradient_dtype=gradient_dtype(self._parameters),
            device=device,
            plan=plan,
        )
        self._step = torch.zeros(())
        for number, parameter in enumerate(self._parameters):
            self.state[parameter] = _Entry(self._states, number, parameter, self._step)
        self._pending_scale = 1.0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._is_last = self._has_passed = False
        self._told: dict[int, tuple[Tensor, int]] = {}
        self._addresses = [p.data_ptr() for p in self._parameters]
        self._note_weights()
        self._online: Any = None
        if watch and isinstance(self._states.device, Clock) and not self._states.device.host_weights:
            from pretrain.optim.offload.online import Online

            self._online = self._states.watcher = Online(self._states)

    @property
    def states(self) -> OffloadedStates:
        """The state behind: plan, memory, timeline."""
        assert self._states is not None
        return self._states

    def report(self) -> dict[str, float]:
        """Numbers of the last update whose times are known and of the present plan; empty where nothing watches."""
        return {} if self._online is None else self._online.report()

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "OffloadedAdamW cannot be copied or pickled, because its state lies in pinned memory and device queues: "
            "save state_dict(), and load it into an optimizer constructed over the other parameters"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while constructing.

        Raises:
            ValueError: afterwards, because subgroups are cut and placed by then.
        """
        if self._states is not None:
            raise ValueError("offloaded state is cut into subgroups already: construct a new optimizer with all groups")
        super().add_param_group(param_group)

    def last_backward(self) -> None:
        """Call before the last backward pass of a step: state is brought to the device while it runs, and with
        ``early_gradients`` gradients go to the host.

        Raises:
            ValueError: ``early_gradients`` where ranks reduce gradients.
        """
        self._check_alone()
        self._pending_scale = 1.0
        self._forget_passes()
        if self.states.config.overlap:
            if not self._handles:
                self._register_hooks()
            self._is_last = True
        self.states.start_early()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The global 2-norm of the gradients; the next step scales them so that it is at most ``max_norm``.

        As ``torch.nn.utils.clip_grad_norm_``, but gradients stay as they are and no pass over them is made.
        """
        self._pending_scale = 1.0
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._pending_scale = min(1.0, max_norm / (float(norm) + 1e-6))
        return norm

    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float = 1.0) -> Any:
        """One update with ``gradient * grad_scale`` (and the factor of :meth:`clip_grad_norm_`).

        Raises:
            RuntimeError: weights are not those that this updates, or are not its masters any more; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Both are there within GradScaler.step only.
        found_inf, loss_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf):
            self.skip_step()
            return loss
        self._check_weights()
        # GradScaler.unscale_ rewrites gradients without a change of their version.
        self._send_again_if_rewritten(certainly=found_inf is not None and loss_scale is None)
        scale, self._pending_scale = grad_scale * self._pending_scale, 1.0
        if loss_scale is not None:
            scale /= float(loss_scale)
        gradients = [None if p.grad is None else _flat(p.grad) for p in self._parameters]
        settings = [GroupSettings.of(group) for group in self.param_groups]
        with torch.no_grad():
            self.states.update(gradients, settings, int(self._step) + 1, scale)
        self._step += 1
        self._is_last, self._told = False, {}
        # A graph that saved the old weights must not be used with the new ones.
        torch.autograd.graph.increment_version([p for p in self._parameters if p.grad is not None])
        self._note_weights()
        return loss

    def skip_step(self) -> None:
        """Drop this step, for instance because gradients overflowed: nothing changes."""
        self._pending_scale = 1.0
        self._is_last, self._told = False, {}
        self.states.discard()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer. A step that was not taken until now is dropped."""
        self._pending_scale = 1.0
        if self._has_passed:
            self._forget_passes()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def take_weights(self) -> None:
        """Make the present weights the masters, after they were changed by others. Moments stay as they are."""
        self._check_addresses()
        self._drop_early()
        for number, parameter in enumerate(self._parameters):
            self.states.write(number, "master", parameter.detach().reshape(-1))
        self._note_weights()

    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW (``step``, ``exp_avg``, ``exp_avg_sq`` by parameter), with ``master`` besides for weights
        that are not FP32. It says nothing of fractions, subgroups or places: any other may load it."""
        self.states.synchronize()
        packed = super().state_dict()
        packed["state"] = {number: dict(entry) for number, entry in packed["state"].items()}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of this class, under any plan, or of torch's AdamW over the same parameters (load weights first).

        A parameter without state, because it was never used, gets moments of zero.

        Raises:
            ValueError: it is that of other parameters or of another update, all faults named; nothing was changed.
        """
        groups, state = state_dict["param_groups"], state_dict["state"]
        mine = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != mine:
            raise ValueError(f"groups of {[len(g['params']) for g in groups]} parameters, expected {mine}")
        # Numbers, or names (torch.distributed.checkpoint.state_dict): what counts is the order.
        entries = [tensors_of(state.get(key, {})) for group in groups for key in group["params"]]
        faults = [*setting_faults(groups), *foreign_faults(groups), *entry_faults(entries, self._parameters)]
        if faults:
            raise ValueError("\n".join(faults))
        self._check_addresses()
        self._drop_early()
        for group, other in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in other.items() if name != "params"})
        self._step.fill_(max((float(entry["step"]) for entry in entries if entry), default=0.0))
        self.states.reset()
        for number, (parameter, entry) in enumerate(zip(self._parameters, entries, strict=True)):
            self.states.write(number, "master", entry.get("master", parameter.detach()).reshape(-1))
            for slot in MOMENTS:
                if slot in entry:
                    self.states.write(number, slot, entry[slot].reshape(-1))
        self._note_weights()

    def _register_hooks(self) -> None:
        # Hooks live as long as the parameters: they must not keep this and all its memory alive.
        this = weakref.ref(self)
        for number, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(_hook(this, number)))
        weakref.finalize(self, _remove, self._handles).atexit = False

    def _passed(self, number: int, parameter: Tensor) -> None:
        """The last backward pass has made the gradient of a parameter: memory of activations is free."""
        self._has_passed = True
        self.states.advance_early()
        gradient = parameter.grad
        # A second time in one pass (reentrant checkpoints), it shows in step() that the first was not final.
        if self._early_gradients and gradient is not None and number not in self._told:
            self._told[number] = gradient, gradient._version
            self.states.gradient_ready(number, _flat(gradient))

    def _send_again_if_rewritten(self, *, certainly: bool) -> None:
        told = self._told.items()
        if not told or not (certainly or any(_is_rewritten(self._parameters[n].grad, *was) for n, was in told)):
            return
        warnings.warn(
            "gradients were rewritten after the backward pass had sent them to the host, so they are sent again: "
            "clip with OffloadedAdamW.clip_grad_norm_, leave out unscale_, or set early_gradients=False",
            stacklevel=4,
        )
        self._told = {}
        self.states.discard()

    def _forget_passes(self) -> None:
        """What a step that was never taken has left: gradients that were sent are not those of the next."""
        self._is_last = self._has_passed = False
        if self._told:
            self._told = {}
            self.states.discard()

    def _drop_early(self) -> None:
        """State on its way to the device would be older than what is written at home now."""
        self._told = {}
        self.states.discard()

    def _check_alone(self) -> None:
        if self._early_gradients and world_size() > 1:
            raise ValueError(
                f"early_gradients=True with {world_size()} ranks: gradients that are reduced between ranks are not "
                "final when the backward pass makes them; set early_gradients=False"
            )

    def _note_weights(self) -> None:
        self._versions = [p._version for p in self._parameters]

    def _check_addresses(self) -> None:
        moved = [n for n, p in enumerate(self._parameters) if p.data_ptr() != self._addresses[n]]
        if moved:
            raise RuntimeError(
                f"parameters {few(moved)} lie in other memory than when the optimizer was constructed, so that its "
                "updates would not reach them (parameter.data was replaced, as by model.to() or "
                "vector_to_parameters): write values in place, or construct a new optimizer"
            )

    @torch.no_grad()
    def _check_weights(self) -> None:
        self._check_addresses()
        # Who writes the same values (a broadcast of weights that are equal) does no harm.
        changed = [
            number
            for number, parameter in enumerate(self._parameters)
            if parameter._version != self._versions[number]
            and parameter.dtype != torch.float32
            and not is_rounded(parameter, self.states.read(number, "master"))
        ]
        if changed:
            raise RuntimeError(
                f"weights of parameters {few(changed)} were changed by others than the optimizer, and its FP32 "
                "masters would undo that: call take_weights() after loading or changing weights"
            )
        self._note_weights()


class _Entry(Mapping[str, Tensor]):
    """What ``Optimizer.state`` has of one parameter, read when it is asked for."""

    def __init__(self, states: OffloadedStates, number: int, parameter: Tensor, step: Tensor) -> None:
        self._states = states
        self._number = number
        self._shape = parameter.shape
        self._step = step
        self._slots = MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, "master")

    def __getitem__(self, name: str) -> Tensor:
        if name == "step":
            return self._step.clone()
        if name not in self._slots:
            raise KeyError(name)
        return self._states.read(self._number, name).view(self._shape)

    def __iter__(self) -> Iterator[str]:
        return iter(("step", *self._slots))

    def __len__(self) -> int:
        return 1 + len(self._slots)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _hook(this: weakref.ref[OffloadedAdamW], number: int) -> Callable[[Tensor], None]:
    def passed(parameter: Tensor) -> None:
        optimizer = this()
        if optimizer is not None and optimizer._is_last:
            optimizer._passed(number, parameter)

    return passed


def _remove(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _flat(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        raise ValueError("a gradient is sparse, expected a dense one: use sparse=False in the embedding")
    return gradient.detach().reshape(-1)


def _is_rewritten(gradient: Tensor | None, told: Tensor, version: int) -> bool:
    return gradient is not told or told._version != version
