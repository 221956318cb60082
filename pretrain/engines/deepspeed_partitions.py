"""Where DeepSpeed keeps FP32 masters, optimizer state and weights at each ZeRO stage.

Stage 0 leaves torch's optimizer on whole parameters. Stages 1 and 2 flatten each parameter group, cut it into one
partition per data-parallel rank and keep masters and moments of the own partition; ``parameter._hp_mapping`` tells what
lies there of a parameter. Stage 3 cuts every parameter by itself into equal pieces, the last of them padded, keeps the
own piece in ``parameter.ds_tensor`` and packs the FP32 pieces of a sub-group into one flat tensor. Offloaded state
lies in the same places, on the host. All this is private to DeepSpeed, so every name is looked up with a check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.parallel.canonical import CanonicalParameter


@dataclass(frozen=True)
class LocalShare:
    """What this rank owns of one trained parameter: flat elements ``[start, start + master.numel())``.

    ``state_key`` is the tensor under which the optimizer keeps its state; the share lies at ``offset`` inside it.
    """

    start: int
    master: Tensor
    state_key: Tensor
    offset: int


Gradients = Callable[[CanonicalParameter, LocalShare], Tensor]
"""Flat gradient of what this rank owns of a trained parameter."""


class Partitions(Protocol):
    """This rank's shares. ``optimizer`` is torch's own, inside DeepSpeed's."""

    optimizer: torch.optim.Optimizer

    def share(self, parameter: CanonicalParameter) -> LocalShare | None:
        """What this rank owns of a trained parameter, None for nothing."""
        ...

    def state_keys(self) -> Iterator[Tensor]:
        """Every tensor that the optimizer steps on this rank."""
        ...

    def gradients(self) -> Gradients:
        """Reads the gradient of shares between the last backward pass of a step and its update."""
        ...


def partitions(zero: Any, stage: int, dp_rank: int) -> Partitions:
    """Shares kept by DeepSpeed's optimizer ``zero``.

    Raises:
        RuntimeError: the installed DeepSpeed keeps its partitions in a way this release does not know.
    """
    if stage == 0:
        return _Replicated(zero)
    return ShardedParameters(zero, dp_rank) if stage == 3 else _FlatGroups(zero)


def attribute(owner: Any, *names: str) -> Any:
    """The first of ``names`` that ``owner`` has.

    Raises:
        RuntimeError: it has none of them.
    """
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise RuntimeError(
        f"{type(owner).__name__} of the installed DeepSpeed has no {' or '.join(names)}, so its state can be neither "
        "saved nor loaded; install the version in constraints.txt"
    )


class _Replicated:
    """Stage 0 in FP32: DeepSpeed hands over torch's optimizer as it is."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def share(self, parameter: CanonicalParameter) -> LocalShare | None:
        return LocalShare(0, parameter.tensor.data.view(-1), parameter.tensor, 0)

    def state_keys(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def gradients(self) -> Gradients:
        def read(parameter: CanonicalParameter, share: LocalShare) -> Tensor:
            gradient = parameter.tensor.grad
            return torch.zeros_like(share.master) if gradient is None else gradient.detach().view(-1)

        return read


class _FlatGroups:
    """Stages 1 and 2."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.optimizer: torch.optim.Optimizer = attribute(zero, "optimizer")
        # The second name is that of the bf16 optimizer of stage 1.
        self._flat: list[Tensor] = list(
            attribute(zero, "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        )

    def share(self, parameter: CanonicalParameter) -> LocalShare | None:
        mapping = attribute(parameter.tensor, "_hp_mapping")
        if mapping is None:
            return None
        flat = self._flat[mapping.param_group_index]
        address = mapping.hp_fragment_address
        master = flat.data.narrow(0, address.start, address.numel)
        return LocalShare(mapping.lp_fragment_address.start, master, flat, address.start)

    def state_keys(self) -> Iterator[Tensor]:
        yield from self._flat

    def gradients(self) -> Gradients:
        if hasattr(self._zero, "fp32_groups_gradient_flat_partition"):  # the bf16 optimizer
            flat = list(self._zero.fp32_groups_gradient_flat_partition)
        else:
            flat = _flat_gradients(self._zero, self._flat)
        by_key = {id(key): gradient for key, gradient in zip(self._flat, flat, strict=True)}
        return lambda _, share: by_key[id(share.state_key)].narrow(0, share.offset, share.master.numel())


class ShardedParameters:
    """Stage 3, where weights are in pieces too."""

    def __init__(self, zero: Any, dp_rank: int) -> None:
        self._zero = zero
        self.optimizer: torch.optim.Optimizer = attribute(zero, "optimizer")
        self._dp_rank = dp_rank
        self._flat: list[Tensor] = attribute(zero, "fp32_partitioned_groups_flat")
        self._position: dict[Any, tuple[int, int, int]] = attribute(zero, "grad_position")
        self._key = attribute(zero, "get_param_id")
        self._release_all = attribute(zero, "_partition_all_parameters")
        self._round_group = attribute(zero, "_reassign_or_swap_out_partitioned_parameters")

    def share(self, parameter: CanonicalParameter) -> LocalShare | None:
        group, offset, length = self._position[self._key(parameter.tensor)]
        start, held = self._held(parameter, length)
        if not held:
            return None
        flat = self._flat[group]
        return LocalShare(start, flat.data.narrow(0, offset, held), flat, offset)

    def state_keys(self) -> Iterator[Tensor]:
        yield from self._flat

    def gradients(self) -> Gradients:
        by_key = {id(key): g for key, g in zip(self._flat, _flat_gradients(self._zero, self._flat), strict=True)}
        return lambda _, share: by_key[id(share.state_key)].narrow(0, share.offset, share.master.numel())

    def weight(self, parameter: CanonicalParameter) -> tuple[int, Tensor]:
        """First flat element and values of this rank's piece of the weight itself, without padding."""
        piece = attribute(parameter.tensor, "ds_tensor")
        start, held = self._held(parameter, piece.numel())
        return start, piece.data.view(-1)[:held]

    def release_gathered(self) -> None:
        """Drop whole copies of parameters (small ones stay gathered between steps): the next use gathers anew."""
        self._release_all()

    def weights_from_masters(self) -> None:
        """Round every master into its weight, as DeepSpeed does at the end of a step."""
        for group in range(len(self._flat)):
            self._round_group(group)

    def _held(self, parameter: CanonicalParameter, length: int) -> tuple[int, int]:
        """Start of this rank's piece of ``length`` and how much of it is no padding."""
        start = self._dp_rank * length
        return start, max(0, min(length, attribute(parameter.tensor, "ds_numel") - start))


def _flat_gradients(zero: Any, masters: list[Tensor]) -> list[Tensor]:
    """Gradients of this rank's flat masters, in their order: lists of pieces, or with offloaded state on the host."""
    flat = []
    for number, master in enumerate(masters):
        if master.grad is not None:  # offloaded: gathered there during the backward passes
            flat.append(master.grad.detach().view(-1))
            continue
        pieces = attribute(zero, "averaged_gradients")[number]
        flat.append(torch.cat([piece.detach().reshape(-1) for piece in pieces]))
    return flat
