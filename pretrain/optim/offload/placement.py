"""Which subgroups go where, and plans made of it. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.sizes import host_parts
from pretrain.optim.offload.subgroups import Subgroup

HOST_BUFFERS = 3
# Early prefetches beyond those that arrive in time: at 0 all buffers are full, and no flush has yet made room.
AHEAD = 2
# With more subgroups of odd sizes than this they are divided by size only: the largest to the device.
MOST_ODD = 4


@dataclass(frozen=True)
class Problem:
    """What a plan is made for. ``early``: overlap with the passes around the update."""

    subgroups: Sequence[Subgroup]
    constants: Constants
    widths: Widths
    window: Window
    early: bool
    host_weights: bool

    def state_bytes(self, subgroup: int) -> int:
        return self.subgroups[subgroup].numel * self.widths.state

    def elements(self, numbers: Iterable[int]) -> int:
        return sum(self.subgroups[i].numel for i in numbers)


def make_plan_of(
    problem: Problem, device_order: Sequence[int], cpu_order: Sequence[int], resident: set[int], num_slots: int
) -> Plan:
    """The plan with these orders; buffers, up to ``num_slots``, early ones and early gradients as memory and time
    allow."""
    places = [Place.CPU] * len(problem.subgroups)
    for subgroup in device_order:
        places[subgroup] = Place.RESIDENT if subgroup in resident else Place.STREAM
    streamed = [i for i in device_order if i not in resident]
    space = problem.window.device_bytes - problem.elements(resident) * problem.widths.state
    while num_slots > 1 and ring_bytes(problem, streamed, num_slots) > space:
        num_slots -= 1
    plan = Plan(
        places=tuple(places),
        device_order=tuple(device_order),
        cpu_order=tuple(cpu_order),
        num_slots=num_slots,
        num_early=early_count(problem, streamed, num_slots, space),
        num_host_buffers=max(1, min(HOST_BUFFERS, len(cpu_order))),
        early_gradients=problem.early and not problem.host_weights and bool(cpu_order),
    )
    if plan.early_gradients and problem.window.host_bytes is not None:
        needed = sum(host_parts(plan, problem.subgroups, problem.widths).values())
        if needed > problem.window.host_bytes:
            return Plan(
                plan.places, plan.device_order, plan.cpu_order, num_slots, plan.num_early, plan.num_host_buffers
            )
    return plan


def ring_bytes(problem: Problem, streamed: Sequence[int], num_slots: int) -> int:
    """Bytes of ``num_slots`` buffers that ``streamed`` goes through in turn, each as large as the largest it holds."""
    sizes = [problem.state_bytes(i) for i in streamed]
    return sum(max(sizes[slot::num_slots], default=0) for slot in range(num_slots))


def early_count(problem: Problem, streamed: Sequence[int], num_slots: int, space: int) -> int:
    """How many of the first streamed subgroups are prefetched in the last backward pass: what arrives in its time, the
    last maybe in part, and AHEAD more, as far as they fit beside the ring of ``num_slots`` buffers in ``space`` bytes
    and the memory that is free then."""
    if not problem.early or problem.window.backward_s <= 0 or not streamed:
        return 0
    arriving = problem.window.backward_s * problem.constants.h2d
    space = problem.window.early_bytes + max(0, space - ring_bytes(problem, streamed, num_slots))
    count, moved, beside, ahead = 0, 0, 0, 0
    for turn, subgroup in enumerate(streamed):
        size = problem.state_bytes(subgroup)
        beside += size if turn >= num_slots else 0
        ahead += moved >= arriving
        if ahead > AHEAD or beside > space:
            break
        moved += size
        count += 1
    return count


def resident_fill(problem: Problem, space: int) -> set[int]:
    """Subgroups whose state fills ``space`` bytes of the device: the largest that fit, first come first."""
    chosen = set()
    for i in sorted(range(len(problem.subgroups)), key=lambda i: (-problem.subgroups[i].numel, i)):
        if problem.state_bytes(i) <= space:
            space -= problem.state_bytes(i)
            chosen.add(i)
    return chosen


class Division:
    """Ways to divide ``numbers`` between device and CPU: some of the subgroups of the most common size, the first ones
    for the device, and a choice of the others ("odd" sizes, such as the tails of parameter groups)."""

    def __init__(self, problem: Problem, numbers: Sequence[int]) -> None:
        sizes = Counter(problem.subgroups[i].numel for i in numbers)
        # Of sizes as common as each other the largest.
        self.size = max(sizes, key=lambda size: (sizes[size], size)) if sizes else 0
        self.common = [i for i in numbers if problem.subgroups[i].numel == self.size]
        odd = [i for i in numbers if problem.subgroups[i].numel != self.size]
        self.odd = sorted(odd, key=lambda i: (-problem.subgroups[i].numel, i))
        self._problem = problem

    def streamed(self, count: int, odd: Iterable[int]) -> tuple[int, ...]:
        """The first ``count`` of the common size and ``odd``, by number."""
        return tuple(sorted((*self.common[:count], *odd)))

    def odd_choices(self) -> Iterator[tuple[int, ...]]:
        if len(self.odd) > MOST_ODD:
            yield from (tuple(self.odd[:count]) for count in range(len(self.odd) + 1))
            return
        for count in range(len(self.odd) + 1):
            yield from combinations(self.odd, count)

    def nearest(self, fraction: float) -> tuple[int, ...]:
        """The division whose share of elements on the device is nearest to ``fraction``."""
        elements = self._problem.elements
        total = elements(self.common) + elements(self.odd)
        best: tuple[float, tuple[int, ...]] | None = None
        for odd in self.odd_choices():
            held = elements(odd)
            count = round((fraction * total - held) / self.size) if self.size else 0
            count = min(max(count, 0), len(self.common))
            miss = abs(held + count * self.size - fraction * total)
            if best is None or miss < best[0] - 1e-9 * total:
                best = miss, self.streamed(count, odd)
        return self._improved(best[1], fraction * total) if best is not None else ()

    def _improved(self, chosen: tuple[int, ...], wanted: float) -> tuple[int, ...]:
        """With many sizes: exchanges that come nearer, as long as there are."""
        if len(self.odd) <= MOST_ODD:
            return chosen
        numel = self._problem.subgroups
        inside, outside = set(chosen), {*self.common, *self.odd} - set(chosen)
        miss = wanted - self._problem.elements(inside)
        while True:
            moves: list[tuple[float, int | None, int | None]] = []
            moves += [(abs(miss - numel[j].numel), None, j) for j in outside]
            moves += [(abs(miss + numel[i].numel), i, None) for i in inside]
            moves += [(abs(miss + numel[i].numel - numel[j].numel), i, j) for i in inside for j in outside]
            after, out, new = min(moves, key=lambda move: move[0])
            if after >= abs(miss) * (1 - 1e-12):
                return tuple(sorted(inside))
            if out is not None:
                inside.remove(out)
                outside.add(out)
                miss += numel[out].numel
            if new is not None:
                inside.add(new)
                outside.remove(new)
                miss -= numel[new].numel
