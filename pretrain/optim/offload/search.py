"""The search for a plan: which subgroups are streamed, in which order, through how many buffers. Torch-free.

Shares are looked at over their whole range before any is looked at closely: early state and gradients make the time of
a step as a function of the share one with several valleys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from pretrain.optim.offload.constants import Window
from pretrain.optim.offload.placement import Division, Problem, make_plan_of
from pretrain.optim.offload.schedule import Plan
from pretrain.optim.offload.simulate import Timeline, simulate
from pretrain.optim.offload.sizes import device_parts, host_parts

# All divisions are tried of so many subgroups at most; exchanges and orders of so many of different sizes.
EXHAUSTIVE = 7
LOCAL = 16
# All numbers of early subgroups are tried of so many streamed ones.
FEW_STREAMED = 8
# Simulated subgroups, about, that the search of one option may take, and simulations.
WORK = 6_000
MOST_TRIALS = 400
LEAST_TRIALS = 10
# Shares looked at first; of more than MANY subgroups those of a smaller problem that is like it, of about LIKE.
SPREAD = 33
MANY = 96
LIKE = 32
# Options that are searched closely, those of the best first look.
CLOSELY = 2

Found = tuple[float, Plan]


@dataclass(frozen=True)
class Option:
    """Residents, and the most device buffers; none of the others is streamed where there are none."""

    resident: frozenset[int]
    slots: int


def search(problem: Problem, options: Sequence[Option], fraction: float | None) -> list[Found]:
    """Exposed seconds and plan of those ``options`` that look best, the best first; none where nothing fits.

    ``fraction``: see :func:`~pretrain.optim.offload.plan.make_plan`.
    """
    searches = [Search(problem, option, fraction) for option in options]
    looks = [(one.look(), number) for number, one in enumerate(searches)]
    first = sorted(look for look in looks if look[0] < float("inf"))
    closely = len(first) if len(problem.subgroups) <= EXHAUSTIVE else CLOSELY if len(problem.subgroups) <= MANY else 1
    found = [searches[number].best() for _, number in first[:closely]]
    return sorted((one for one in found if one is not None), key=lambda f: judged(problem, f))


def judged(problem: Problem, found: Found) -> tuple[bool, float]:
    """What plans are compared by: first of all they have to fit in the host's memory."""
    return over_host(problem, found[1]) > 0, found[0]


def times(problem: Problem, plan: Plan) -> Timeline:
    """A step under ``plan``, simulated."""
    return simulate(
        plan,
        problem.subgroups,
        problem.constants,
        problem.widths,
        problem.window,
        host_weights=problem.host_weights,
    )


def over_host(problem: Problem, plan: Plan) -> int:
    """Bytes of host memory that are missing."""
    if problem.window.host_bytes is None:
        return 0
    parts = host_parts(plan, problem.subgroups, problem.widths, host_weights=problem.host_weights)
    return max(0, sum(parts.values()) - problem.window.host_bytes)


def fits_device(problem: Problem, plan: Plan) -> bool:
    """Whether buffers and residents fit, without early buffers too."""
    window = problem.window
    bare = device_parts(plan.without_early_buffers(), problem.subgroups, problem.widths)
    parts = device_parts(plan, problem.subgroups, problem.widths)
    lasting = parts["resident state"] + parts["buffers"]
    return (
        max(lasting, sum(bare.values())) <= window.device_bytes
        and sum(parts.values()) <= window.device_bytes + window.early_bytes
    )


class Search:
    """The best division, orders and buffers for one option."""

    def __init__(self, problem: Problem, option: Option, fraction: float | None) -> None:
        self.problem, self.option, self.fraction = problem, option, fraction
        self.numbers = [i for i in range(len(problem.subgroups)) if i not in option.resident]
        self.division = Division(problem, self.numbers)
        self.top = len(self.division.common) if option.slots else 0
        self.left = min(MOST_TRIALS, max(LEAST_TRIALS, WORK // (len(problem.subgroups) + 1)))
        self.known: dict[tuple[int, ...], Found] = {}
        self.around: list[int] = []
        self.step = 1

    def look(self) -> float:
        """Seconds of the best of some divisions, spread over all; infinite where the fraction asked for does not fit.

        Of many subgroups only about.
        """
        if self.fraction is not None:
            chosen = self.division.nearest(self.fraction)
            return self._evaluate(chosen)[0] if self.option.slots or not chosen else float("inf")
        if len(self.numbers) <= EXHAUSTIVE:
            for count in range(len(self.numbers) + 1 if self.option.slots else 1):
                for chosen in combinations(self.numbers, count):
                    self._evaluate(chosen)
            return min(self.known.values(), key=lambda f: f[0])[0]
        if len(self.numbers) > MANY and self.top:
            return self._look_alike()
        number = SPREAD if self.left > 2 * SPREAD else SPREAD // 2 + 1
        if self.top <= 2 * SPREAD and self.top < self.left // 3:
            number = self.top + 1
        counts = _spread(self.top, number)
        self._evaluate(())
        best = sorted((self._count(n), n) for n in counts)
        self.around, self.step = [n for _, n in best[:4]], max(1, self.top // max(1, number - 1))
        return best[0][0]

    def _look_alike(self) -> float:
        """The look at every k-th subgroup in a window that is k times shorter, which takes 1/k of the time, about."""
        every = -(-len(self.numbers) // LIKE)
        resident = sorted(self.option.resident)[::every]
        kept = sorted((*resident, *self.numbers[::every]))
        window, state = self.problem.window, self.problem.state_bytes
        ring = self.option.slots * max(state(i) for i in self.numbers)
        beside = window.device_bytes - ring - sum(state(i) for i in self.option.resident)
        small = replace(
            self.problem,
            subgroups=tuple(replace(self.problem.subgroups[i], index=n) for n, i in enumerate(kept)),
            window=Window(
                device_bytes=ring + sum(state(i) for i in resident) + max(0, beside) // every,
                early_bytes=window.early_bytes // every,
                backward_s=window.backward_s / every,
                forward_s=window.forward_s / every,
            ),
        )
        alike = Search(small, Option(frozenset(kept.index(i) for i in resident), self.option.slots), None)
        seconds = alike.look()
        self.step = max(1, every // 2)
        self.around = [min(self.top, n * every) for n in alike.around[:1]]
        return seconds * every

    def best(self) -> Found | None:
        """Exposed seconds and the plan; call :meth:`look` before."""
        if self.fraction is None and len(self.numbers) > EXHAUSTIVE:
            for count in self.around:
                self._descend(count)
            around = min(range(self.top + 1), key=lambda n: self._known_count(n))
            self._odd_ones(around)
            if self.option.slots and len(self.numbers) <= LOCAL and len(self.division.odd) > 1:
                self._exchanges()
        # Orders and buffers may turn round what is close.
        near = sorted(self.known.values(), key=lambda f: f[0])[: 12 if len(self.numbers) <= EXHAUSTIVE else 4]
        found = [self._ordered(one) for one in near if one[0] < float("inf")]
        found = [self._varied(one) for one in sorted(found, key=lambda f: f[0])[:4]]
        return min(found, key=lambda f: f[0], default=None)

    def _count(self, count: int) -> float:
        return self._evaluate(self.division.streamed(count, ()))[0]

    def _known_count(self, count: int) -> float:
        found = self.known.get(self.division.streamed(count, ()))
        return float("inf") if found is None else found[0]

    def _descend(self, count: int) -> None:
        """Coarse to fine: a step is halved when neither way is better."""
        step, here = self.step, self._count(count)
        while step:
            ways = [n for n in (count - step, count + step) if 0 <= n <= self.top]
            found = [(self._count(n), n) for n in ways if self.left > 0 or self._known_count(n) < float("inf")]
            if found and min(found)[0] < here:
                here, count = min(found)
            else:
                step //= 2

    def _odd_ones(self, around: int) -> None:
        """Subgroups of other sizes on either side, with a count of the common ones that makes up for them."""
        for odd in self.division.odd_choices() if self.option.slots else ():
            even = around - round(self.problem.elements(odd) / self.division.size)
            for count in sorted({even, even + 1, even - 1, around, around - 1}, key=lambda n: abs(n - even)):
                if 0 <= count <= self.top and self.left > 0:
                    self._evaluate(self.division.streamed(count, odd))

    def _exchanges(self) -> None:
        """Single moves and exchanges of two, as long as they are better."""
        while self.left > 0:
            time, plan = min(self.known.values(), key=lambda found: found[0])
            inside = set(plan.streamed)
            outside = [i for i in self.numbers if i not in inside]
            near = [inside ^ {i} for i in self.numbers]
            near += [inside ^ {i, j} for i in inside for j in outside]
            found = [self._evaluate(tuple(sorted(s)))[0] for s in near if self.left > 0]
            if not found or min(found) >= time * (1 - 1e-12):
                return

    def _evaluate(self, streamed: tuple[int, ...]) -> Found:
        if streamed not in self.known:
            inside = set(streamed)
            plan = self._plan(
                _descending(self.problem, streamed),
                # Gradients of the last subgroups are final first.
                _descending(self.problem, [i for i in reversed(self.numbers) if i not in inside]),
                0,
            )
            self.known[streamed] = self._judge(plan)
        return self.known[streamed]

    def _judge(self, plan: Plan) -> Found:
        if not fits_device(self.problem, plan):
            return float("inf"), plan
        self.left -= 1
        return times(self.problem, plan).exposed_s, plan

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

    def _ordered(self, here: Found) -> Found:
        """The best of some orders that drain and fill the queues well, then of exchanges of neighbours."""
        plan = here[1]
        found = [here]
        positions = range(4) if self.option.resident and plan.streamed else (0,)
        for device, cpu, position in product(
            _orders(self.problem, plan.streamed), _orders(self.problem, plan.cpu_order), positions
        ):
            if self.left > 0 and (other := self._plan(device, cpu, position)) != plan:
                found.append(self._judge(other))
        best = min(found, key=lambda f: f[0])
        if len(self.numbers) <= LOCAL and len({self.problem.subgroups[i].numel for i in self.numbers}) > 1:
            best = self._neighbours(best)
        return best

    def _neighbours(self, best: Found) -> Found:
        better = True
        while better and self.left > 0:
            better = False
            for other in _swapped(best[1]):
                plan = make_plan_of(self.problem, *other, set(self.option.resident), best[1].num_slots)
                if self.left > 0 and (found := self._judge(plan))[0] < best[0] * (1 - 1e-9):
                    best, better = found, True
                    break
        return best

    def _varied(self, best: Found) -> Found:
        """Other numbers of buffers and of early subgroups, and gradients after the backward pass."""
        better = True
        while better and self.left > 0:
            better = False
            for plan in _variants(best[1]):
                if self.left > 0 and not over_host(self.problem, plan):
                    found = self._judge(plan)
                    if found[0] < best[0] * (1 - 1e-9):
                        best, better = found, True
                        break
        return best


def _variants(plan: Plan) -> Iterator[Plan]:
    if plan.early_gradients:
        yield replace(plan, early_gradients=False)
    if not plan.num_early:
        return
    most = len(plan.streamed)
    if most <= FEW_STREAMED:
        for slots, early in product(range(plan.num_slots, 0, -1), range(most, -1, -1)):
            yield replace(plan, num_slots=slots, num_early=early)
        return
    now = plan.num_early
    for early in (now + 1, now - 1, now + 2, now - 2, now * 2, now // 2, most, 0):
        if 0 <= early <= most:
            yield replace(plan, num_early=early)
    for slots in range(1, plan.num_slots):
        yield replace(plan, num_slots=slots)


def _spread(top: int, number: int) -> list[int]:
    """``number`` counts from 0 to ``top``, evenly."""
    return sorted({round(top * n / max(1, number - 1)) for n in range(number)})


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
