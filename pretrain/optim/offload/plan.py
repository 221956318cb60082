"""Plans computed from measured constants: what is updated where, in which order, through how many buffers. Torch-free.

A plan is judged by its simulated time (:func:`~pretrain.optim.offload.simulate.simulate`), never by a formula; the
closed form only tells where to begin the search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from pretrain.optim.offload.bounds import estimated_fraction, lower_bound
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.placement import Division, Problem, make_plan_of, resident_fill
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.simulate import Timeline, simulate
from pretrain.optim.offload.sizes import device_parts, host_parts
from pretrain.optim.offload.subgroups import Subgroup

GIB = 2**30
# Device buffers that streamed state cycles through: one filled, one updated, one emptied.
SLOTS = 3
MOST_SLOTS = 8
# More buffers than SLOTS have to shorten the step by this share.
SLOT_GAIN = 0.005
# All divisions are tried of so many subgroups at most; exchanges and orders of so many of different sizes; other
# numbers of buffers and residents where there are so many.
EXHAUSTIVE = 7
LOCAL = 16
FEW = 64
# Simulated operations, about, that a search may take for what gains little: tails, exchanges, orders.
BUDGET = 60_000
MOST_TRIALS = 400


@dataclass(frozen=True)
class Planned:
    """A plan, its simulated step and what it was chosen for, in lines of text. ``fraction``: share of the offloaded
    elements that is updated on the device; ``resident_fraction``: share of all whose state stays there."""

    plan: Plan
    timeline: Timeline
    why: tuple[str, ...]
    fraction: float
    resident_fraction: float


def make_plan(
    subgroups: Sequence[Subgroup],
    constants: Constants,
    widths: Widths,
    window: Window,
    *,
    fraction: float | None = None,
    resident_fraction: float | None = None,
    overlap: bool = True,
    host_weights: bool = False,
) -> Planned:
    """The plan with the least exposed time.

    Args:
        fraction: share of the offloaded elements to update on the device, as near as whole subgroups come; None: that
            of the least time.
        resident_fraction: share of all elements whose state stays on the device; None: what fits there.
        overlap: use ``window``'s backward and forward passes.
        host_weights: see :func:`~pretrain.optim.offload.schedule.update_operations`.

    Raises:
        ValueError: a fraction outside [0, 1], or memory that does not hold what was asked for, with the numbers.
    """
    for name, value in (("fraction", fraction), ("resident_fraction", resident_fraction)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected a share from 0 to 1")
    if not overlap:
        window = Window(device_bytes=window.device_bytes, host_bytes=window.host_bytes)
    problem = Problem(subgroups, constants, widths, window, overlap, host_weights)
    options = list(_options(problem, fraction, resident_fraction))
    found = [_Search(problem, option, fraction).best() for option in options]
    # First of all it has to fit; then fewer buffers are better where they take little more time.
    time, planned = min(
        found,
        key=lambda f: (_over_host(problem, f[1]) > 0, f[0] * (1 + SLOT_GAIN if f[1].num_slots > SLOTS else 1)),
    )
    planned = _with_fewer_slots(problem, planned, time)
    timeline = _times(problem, planned)
    _check_host(problem, planned)
    return Planned(
        plan=planned,
        timeline=timeline,
        why=tuple(_why(problem, planned, timeline, fraction, resident_fraction)),
        fraction=_share(problem, planned, Place.STREAM, Place.CPU),
        resident_fraction=_share(problem, planned, Place.RESIDENT, Place.STREAM, Place.CPU),
    )


@dataclass(frozen=True)
class _Option:
    """Residents, and the number of buffers for at most ``most`` streamed subgroups (None: any number)."""

    resident: frozenset[int]
    slots: int
    most: int | None


def _options(problem: Problem, fraction: float | None, resident_fraction: float | None) -> Iterator[_Option]:
    space = problem.window.device_bytes
    everything = range(len(problem.subgroups))
    largest = max((problem.state_bytes(i) for i in everything), default=0)
    if resident_fraction is not None:
        resident = frozenset(Division(problem, everything).nearest(resident_fraction))
        taken = sum(problem.state_bytes(i) for i in resident)
        if taken > space:
            raise ValueError(
                f"resident_fraction {resident_fraction} keeps {taken} bytes of state on the device ({len(resident)} "
                f"subgroups, {problem.elements(resident)} elements of {problem.widths.state} bytes), but device_bytes "
                f"is {space}: lower resident_fraction"
            )
        space -= taken
        largest = max((problem.state_bytes(i) for i in everything if i not in resident), default=0)
    fitting = min(space // largest, SLOTS) if largest else 0
    if fraction is not None and fraction > 0:
        rest = [i for i in everything if resident_fraction is None or i not in resident]
        if not fitting and Division(problem, rest).nearest(fraction):
            raise ValueError(
                f"fraction {fraction} streams state through the device, where one buffer takes {largest} bytes (the "
                f"largest subgroup's elements, {problem.widths.state} bytes each), but {space} of device_bytes "
                f"{problem.window.device_bytes} are left: lower subgroup_size or resident_fraction, or set fraction to "
                "0"
            )
    if resident_fraction is not None:
        yield _Option(resident, fitting, None if fitting else 0)
        # Prefetches may run ahead of flushes that the next forward pass hides, or of larger ones.
        roomy = min(space // largest, MOST_SLOTS) if largest else 0
        if roomy > SLOTS and (problem.window.forward_s > 0 or len(everything) <= FEW):
            yield _Option(resident, roomy, None)
        return
    # Buffers take memory of residents. With fewer than fit, only so few subgroups are streamed that each has its own.
    for slots in range(fitting + 1) if len(everything) <= FEW else sorted({0, fitting}):
        resident = frozenset(resident_fill(problem, space - slots * largest))
        yield _Option(resident, slots, None if slots == fitting and slots else slots)


class _Search:
    """The best division and orders for one option."""

    def __init__(self, problem: Problem, option: _Option, fraction: float | None) -> None:
        self.problem, self.option, self.fraction = problem, option, fraction
        self.numbers = [i for i in range(len(problem.subgroups)) if i not in option.resident]
        self.most = len(self.numbers) if option.most is None else min(option.most, len(self.numbers))
        self.division = Division(problem, self.numbers)
        self.left = min(MOST_TRIALS, max(8, BUDGET // (4 * len(problem.subgroups) + 1)))
        self.known: dict[tuple[int, ...], tuple[float, Plan]] = {}

    def best(self) -> tuple[float, Plan]:
        """Exposed seconds and the plan; infinite where the option does not allow the fraction asked for."""
        if self.fraction is not None:
            chosen = self.division.nearest(self.fraction)
            found = [self._evaluate(chosen)] if len(chosen) <= self.most else []
        else:
            found = self._divisions()
        if not found:
            return float("inf"), make_plan_of(self.problem, [], self.numbers, set(), 0)
        # Orders may turn round what is close.
        found = sorted(found, key=lambda f: f[0])[: 12 if len(self.numbers) <= EXHAUSTIVE else 3]
        return min((self._ordered(plan) for _, plan in found), key=lambda f: f[0])

    def _divisions(self) -> list[tuple[float, Plan]]:
        if len(self.numbers) <= EXHAUSTIVE:
            for count in range(self.most + 1):
                for chosen in combinations(self.numbers, count):
                    self._evaluate(chosen)
            return list(self.known.values())
        top = min(self.most, len(self.division.common))
        estimate = estimated_fraction(
            self.problem.elements(self.numbers),
            self.problem.constants,
            self.problem.widths,
            self.problem.window,
            host_weights=self.problem.host_weights,
        )
        count = min(top, round(estimate * len(self.division.common)))
        # Coarse to fine: a step is halved when neither way is better.
        step = max(1, len(self.numbers) // 32)
        here = self._evaluate(self.division.streamed(count, ()))[0]
        while step:
            ways = [n for n in (count - step, count + step) if 0 <= n <= top]
            times = [(self._evaluate(self.division.streamed(n, ()))[0], n) for n in ways]
            if times and min(times)[0] < here:
                here, count = min(times)
            else:
                step //= 2
        self._odd_ones(count, top)
        if len(self.numbers) <= LOCAL and len(self.division.odd) > 1:
            self._exchanges()
        self._evaluate(())
        return list(self.known.values())

    def _odd_ones(self, around: int, top: int) -> None:
        """Subgroups of other sizes on either side, with a count of the common ones that makes up for them."""
        for odd in self.division.odd_choices():
            even = around - round(self.problem.elements(odd) / self.division.size)
            for count in sorted({even, even + 1, even - 1, around, around - 1}, key=lambda n: abs(n - even)):
                if 0 <= count <= top and count + len(odd) <= self.most and self.left > 0:
                    self._evaluate(self.division.streamed(count, odd))

    def _exchanges(self) -> None:
        """Single moves and exchanges of two, as long as they are better."""
        while self.left > 0:
            time, plan = min(self.known.values(), key=lambda found: found[0])
            inside = set(plan.streamed)
            outside = [i for i in self.numbers if i not in inside]
            near = [inside ^ {i} for i in self.numbers]
            near += [inside ^ {i, j} for i in inside for j in outside]
            times = [self._evaluate(tuple(sorted(s)))[0] for s in near if len(s) <= self.most and self.left > 0]
            if not times or min(times) >= time * (1 - 1e-12):
                return

    def _evaluate(self, streamed: tuple[int, ...]) -> tuple[float, Plan]:
        if streamed not in self.known:
            inside = set(streamed)
            plan = self._plan(
                _descending(self.problem, streamed),
                # Gradients of the last subgroups are final first.
                _descending(self.problem, [i for i in reversed(self.numbers) if i not in inside]),
                0,
            )
            self.left -= 1
            self.known[streamed] = _times(self.problem, plan).exposed_s, plan
        return self.known[streamed]

    def _plan(self, streamed: Sequence[int], cpu_order: Sequence[int], position: int) -> Plan:
        """``position``: of the residents: as soon as early state is updated, first, evenly between, or last."""
        resident = sorted(self.option.resident)
        slots = min(self.option.slots, len(streamed))
        early = make_plan_of(self.problem, streamed, cpu_order, set(self.option.resident), slots).num_early
        if position == 2 and streamed:
            device: list[int] = []
            for turn, subgroup in enumerate(streamed):
                low, high = (len(resident) * t // len(streamed) for t in (turn, turn + 1))
                device += [subgroup, *resident[low:high]]
        else:
            at = {0: early, 1: 0}.get(position, len(streamed))
            device = [*streamed[:at], *resident, *streamed[at:]]
        return make_plan_of(self.problem, device, cpu_order, set(self.option.resident), slots)

    def _ordered(self, plan: Plan) -> tuple[float, Plan]:
        """The best of some orders that drain and fill the queues well, then of exchanges of neighbours."""
        found = [(_times(self.problem, plan).exposed_s, plan)]
        positions = range(4) if self.option.resident and plan.streamed else (0,)
        for device, cpu, position in product(
            _orders(self.problem, plan.streamed), _orders(self.problem, plan.cpu_order), positions
        ):
            other = self._plan(device, cpu, position)
            if other != plan and (self.left > 0 or position):
                self.left -= 1
                found.append((_times(self.problem, other).exposed_s, other))
        best = min(found, key=lambda f: f[0])
        if len(self.numbers) <= LOCAL and len({self.problem.subgroups[i].numel for i in self.numbers}) > 1:
            best = self._neighbours(best)
        return best

    def _neighbours(self, best: tuple[float, Plan]) -> tuple[float, Plan]:
        better = True
        while better and self.left > 0:
            better = False
            for other in _swapped(best[1]):
                plan = make_plan_of(self.problem, *other, set(self.option.resident), best[1].num_slots)
                self.left -= 1
                time = _times(self.problem, plan).exposed_s
                if time < best[0] * (1 - 1e-9):
                    best, better = (time, plan), True
                    break
        return best


def _descending(problem: Problem, numbers: Sequence[int]) -> list[int]:
    """The largest first: the last, which nothing hides, is the smallest. Keeps the order of equals."""
    return sorted(numbers, key=lambda i: -problem.subgroups[i].numel)


def _orders(problem: Problem, numbers: Sequence[int]) -> Iterator[list[int]]:
    """Orders of ``numbers`` that differ in their sizes: descending, ascending, the smallest or its next one first."""
    down = _descending(problem, numbers)
    seen = set()
    for order in (down, down[::-1], down[-1:] + down[:-1], down[-2:-1] + down[:-2] + down[-1:]):
        sizes = tuple(problem.subgroups[i].numel for i in order)
        if sizes not in seen:
            seen.add(sizes)
            yield order


def _swapped(plan: Plan) -> Iterator[tuple[list[int], list[int]]]:
    for side, order in enumerate((plan.device_order, plan.cpu_order)):
        for low, high in combinations(range(len(order)), 2):
            other = list(order)
            other[low], other[high] = other[high], other[low]
            yield (other, list(plan.cpu_order)) if side == 0 else (list(plan.device_order), other)


def _with_fewer_slots(problem: Problem, plan: Plan, time: float) -> Plan:
    """No more buffers above SLOTS than shorten the step."""
    while plan.num_slots > SLOTS:
        fewer = replace(plan, num_slots=plan.num_slots - 1)
        if _times(problem, fewer).exposed_s > time * (1 + SLOT_GAIN):
            break
        plan = fewer
    return plan


def _times(problem: Problem, plan: Plan) -> Timeline:
    return simulate(
        plan,
        problem.subgroups,
        problem.constants,
        problem.widths,
        problem.window,
        host_weights=problem.host_weights,
    )


def _share(problem: Problem, plan: Plan, wanted: Place, *others: Place) -> float:
    counted = dict.fromkeys((wanted, *others), 0)
    for subgroup, place in zip(problem.subgroups, plan.places, strict=True):
        if place in counted:
            counted[place] += subgroup.numel
    total = sum(counted.values())
    return counted[wanted] / total if total else 0.0


def _over_host(problem: Problem, plan: Plan) -> int:
    """Bytes of host memory that are missing."""
    if problem.window.host_bytes is None:
        return 0
    parts = host_parts(plan, problem.subgroups, problem.widths, host_weights=problem.host_weights)
    return max(0, sum(parts.values()) - problem.window.host_bytes)


def _check_host(problem: Problem, plan: Plan) -> None:
    limit = problem.window.host_bytes
    if _over_host(problem, plan):
        parts = host_parts(plan, problem.subgroups, problem.widths, host_weights=problem.host_weights)
        listed = ", ".join(f"{name} {size}" for name, size in parts.items() if size)
        raise ValueError(
            f"offloaded state needs {sum(parts.values())} bytes of host memory ({listed}), but host_bytes is {limit}: "
            "keep more on the device (resident_fraction), store fewer bytes (master: low_bits), use more ranks or "
            "raise the limit"
        )


def _why(
    problem: Problem, plan: Plan, timeline: Timeline, fraction: float | None, resident_fraction: float | None
) -> Iterator[str]:
    by_place = {place: [i for i, p in enumerate(plan.places) if p is place] for place in Place}
    streamed, on_cpu, resident = (by_place[place] for place in (Place.STREAM, Place.CPU, Place.RESIDENT))
    everything = problem.elements(range(len(plan.places)))
    asked = "what fits" if resident_fraction is None else f"nearest to {resident_fraction:g}"
    share = _share(problem, plan, Place.RESIDENT, Place.STREAM, Place.CPU)
    yield f"{len(plan.places)} subgroups, {everything} elements, {problem.widths.state} bytes of state each"
    yield f"resident on the device: {len(resident)} subgroups, {share:.1%} of the elements ({asked})"
    asked = "least exposed time" if fraction is None else f"nearest to {fraction:g}"
    share = _share(problem, plan, Place.STREAM, Place.CPU)
    yield f"of the others {len(streamed)} are updated on the device, {share:.1%} of the elements ({asked})"
    parts = device_parts(plan, problem.subgroups, problem.widths)
    held = parts["resident state"] + parts["buffers"]
    yield (
        f"{plan.num_slots} device buffers and resident state take {held / GIB:.2f} of "
        f"{problem.window.device_bytes / GIB:.2f} GiB"
    )
    if len(streamed) > plan.num_slots and plan.num_slots < SLOTS:
        yield f"fewer than {SLOTS} buffers: {SLOTS} do not fit, so transfers of both directions wait for each other"
    if plan.num_early:
        yield (
            f"{plan.num_early} subgroups come in the last backward pass ({problem.window.backward_s:.3f} s), "
            f"through {parts['early buffers'] / GIB:.2f} GiB more of buffers; {problem.window.early_bytes / GIB:.2f} "
            "GiB become free then"
        )
    if problem.early and on_cpu and not plan.early_gradients and not problem.host_weights:
        yield f"gradients go to the host after the backward pass: host_bytes {problem.window.host_bytes} hold no more"
    bound = lower_bound(
        problem.elements(streamed),
        problem.elements(on_cpu),
        problem.elements(resident),
        problem.constants,
        problem.widths,
        problem.window,
        host_weights=problem.host_weights,
    )
    yield f"weights new after {timeline.update_s:.4f} s, exposed {timeline.exposed_s:.4f} s; no less than {bound:.4f} s"
