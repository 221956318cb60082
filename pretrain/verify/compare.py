"""Comparing traces: the first divergence by name and rank, or how far two trajectories are apart. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.verify.traces import Moment

ABSENT = "absent"
_ALL_RANKS = "sum over ranks"


@dataclass(frozen=True)
class Divergence:
    """One quantity of one step that differs. ``others`` counts further tensors of the step that differ too."""

    step: int
    quantity: str
    where: str
    expected: str
    found: str
    others: int = 0

    def __str__(self) -> str:
        more = f" (and {self.others} more tensors of this step)" if self.others else ""
        return f"step {self.step}, {self.quantity}, {self.where}: {self.expected} != {self.found}{more}"


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference of the loss (nats per target) and of the gradient norm (relative)."""

    loss: float
    grad_norm: float


@dataclass
class Deviation:
    """How far apart two trajectories are, and the first step that is too far."""

    loss: float = 0.0
    loss_step: int = 0
    grad_norm: float = 0.0
    grad_norm_step: int = 0
    steps: int = 0
    state_bitwise_steps: int = 0
    trajectory_bitwise: bool = True
    divergence: Divergence | None = field(default=None)

    @property
    def is_bitwise(self) -> bool:
        """Whether loss, gradient norm and state have the same bits at every step."""
        return self.trajectory_bitwise and self.state_bitwise_steps == self.steps


def exact_divergence(expected: Moment, found: Moment) -> Divergence | None:
    """First difference of a step between two runs of the same layout, rank by rank and bit by bit.

    In the order of cause: samples, randomness, loss, gradient norm, scalars, then tensors in the model's order.
    """
    assert len(expected.records) == len(found.records), "other layouts have other ranks"
    pairs = list(zip(expected.records, found.records, strict=True))
    for key, quantity in (
        ("sample_ids", "sample ids"),
        ("rng", "random state"),
        ("loss", "loss"),
        ("grad_norm", "gradient norm"),
        ("scalars", "optimizer scalars"),
    ):
        for rank, (left, right) in enumerate(pairs):
            if repr(left.get(key)) != repr(right.get(key)):
                return Divergence(found.step, quantity, f"rank {rank}", *_shown(left.get(key), right.get(key)))
    differing = [
        (name, rank, left["state"].get(name, ABSENT), right["state"].get(name, ABSENT))
        for rank, (left, right) in enumerate(pairs)
        for name in _union(left["state"], right["state"])
        if left["state"].get(name) != right["state"].get(name)
    ]
    if not differing:
        return None
    name, rank, left, right = differing[0]
    return Divergence(found.step, name, f"rank {rank}", left, right, len({d[0] for d in differing}) - 1)


def state_divergence(expected: Moment, found: Moment, slots: Sequence[str] | None = None) -> Divergence | None:
    """First logical tensor (of ``slots``, default all) that differs in any bit, whatever the two layouts."""
    differing = [
        (name, expected.state.get(name, ABSENT), found.state.get(name, ABSENT))
        for name in _union(expected.state, found.state)
        if (slots is None or name.partition(":")[0] in slots) and expected.state.get(name) != found.state.get(name)
    ]
    if not differing:
        return None
    return Divergence(found.step, differing[0][0], _ALL_RANKS, *differing[0][1:], len(differing) - 1)


def scalar_divergence(expected: Moment, found: Moment) -> Divergence | None:
    """Whether a rank holds other optimizer scalars than the first rank of ``expected``."""
    reference = expected.records[0]["scalars"]
    for rank, record in enumerate(found.records):
        if record["scalars"] != reference:
            return Divergence(found.step, "optimizer scalars", f"rank {rank}", *_shown(reference, record["scalars"]))
    return None


def deviation(
    expected: Mapping[int, Moment], found: Mapping[int, Moment], steps: range, tolerance: Tolerance
) -> Deviation:
    """Distance of two trajectories over ``steps``, on any layouts; a step that one lacks is a divergence."""
    result = Deviation(steps=len(steps))
    for step in steps:
        left, right = expected.get(step), found.get(step)
        if left is None or right is None:
            shown = ("recorded", ABSENT) if right is None else (ABSENT, "recorded")
            result.divergence = result.divergence or Divergence(step, "step", "all ranks", *shown)
            result.trajectory_bitwise = False
            break
        loss = abs(right.loss - left.loss)
        norm = abs(right.grad_norm - left.grad_norm) / max(abs(left.grad_norm), 1e-30)
        if loss > result.loss:
            result.loss, result.loss_step = loss, step
        if norm > result.grad_norm:
            result.grad_norm, result.grad_norm_step = norm, step
        result.trajectory_bitwise &= loss == 0 and norm == 0
        result.state_bitwise_steps += left.state == right.state
        result.divergence = result.divergence or next(_beyond(left, right, loss, norm, tolerance), None)
    return result


def _beyond(left: Moment, right: Moment, loss: float, norm: float, tolerance: Tolerance) -> Iterator[Divergence]:
    where = "all ranks"
    if left.sample_ids != right.sample_ids:
        yield Divergence(right.step, "sample ids", where, *_shown(left.sample_ids, right.sample_ids))
    # Written so that a NaN is beyond every tolerance.
    if not loss <= tolerance.loss:
        yield Divergence(right.step, "loss", where, *_shown(left.loss, right.loss))
    if not norm <= tolerance.grad_norm:
        yield Divergence(right.step, "gradient norm", where, *_shown(left.grad_norm, right.grad_norm))


def _union(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Keys of both in their order."""
    return list({**left, **right})


def _shown(left: Any, right: Any) -> tuple[str, str]:
    """Both values as text; of long lists the part around the first difference."""
    if isinstance(left, list) and isinstance(right, list):
        first = next(
            (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
        )
        return _excerpt(left, first), _excerpt(right, first)
    return repr(left), repr(right)


def _excerpt(values: list[Any], first: int) -> str:
    if len(values) <= 12:
        return repr(values)
    shown = ", ".join(map(repr, values[first : first + 4]))
    return f"[.. from position {first} of {len(values)}: {shown} ..]"
