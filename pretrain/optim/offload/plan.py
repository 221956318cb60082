"""Plans computed from measured constants: what is updated where, in which order, through how many buffers. Torch-free.

A plan is judged by its simulated time (:func:`~pretrain.optim.offload.simulate.simulate`), never by a formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pretrain.optim.offload.bounds import lower_bound
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.placement import Division, Problem, resident_fill
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.search import Option, judged, over_host, search, times
from pretrain.optim.offload.simulate import Timeline
from pretrain.optim.offload.sizes import device_parts, host_parts
from pretrain.optim.offload.subgroups import Subgroup

GIB = 2**30
# Device buffers that streamed state cycles through: one filled, one updated, one emptied.
SLOTS = 3
MOST_SLOTS = 8
# More buffers than SLOTS have to shorten the step by this share.
SLOT_GAIN = 0.005
# Other numbers of buffers and residents are tried of so many subgroups.
FEW = 64


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
    found = search(problem, list(_options(problem, fraction, resident_fraction)), fraction)
    if overlap:
        # What comes early can hold up what is needed first.
        bare = Window(device_bytes=window.device_bytes, host_bytes=window.host_bytes)
        later = replace(problem, window=bare, early=False)
        plans = search(later, list(_options(later, fraction, resident_fraction)), fraction)
        found += [(times(problem, plan).exposed_s, plan) for _, plan in plans]
    # Fewer buffers are better where they take little more time.
    time, planned = min(
        found,
        key=lambda f: (judged(problem, f)[0], f[0] * (1 + SLOT_GAIN if f[1].num_slots > SLOTS else 1)),
    )
    planned = _with_fewer_slots(problem, planned, time)
    timeline = times(problem, planned)
    _check_host(problem, planned)
    return Planned(
        plan=planned,
        timeline=timeline,
        why=tuple(_why(problem, planned, timeline, fraction, resident_fraction)),
        fraction=_share(problem, planned, Place.STREAM, Place.CPU),
        resident_fraction=_share(problem, planned, Place.RESIDENT, Place.STREAM, Place.CPU),
    )


def _options(problem: Problem, fraction: float | None, resident_fraction: float | None) -> Iterator[Option]:
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
    many = len(everything) > FEW
    if resident_fraction is not None:
        yield Option(resident, fitting and SLOTS)
        # Prefetches may run ahead of flushes that the next forward pass hides, or of larger ones.
        roomy = min(space // largest, MOST_SLOTS) if largest else 0
        if roomy > SLOTS and (problem.window.forward_s > 0 or not many):
            yield Option(resident, roomy)
        return
    # Buffers take memory of residents.
    most = min(space // largest, MOST_SLOTS) if largest else 0
    for slots in sorted({0, *range(1, fitting + 1), most} if many else range(most + 1)):
        resident = frozenset(resident_fill(problem, space - slots * largest))
        yield Option(resident, max(slots, SLOTS) if slots else 0)


def _with_fewer_slots(problem: Problem, plan: Plan, time: float) -> Plan:
    """No more buffers above SLOTS than shorten the step."""
    while plan.num_slots > SLOTS:
        fewer = replace(plan, num_slots=plan.num_slots - 1)
        if times(problem, fewer).exposed_s > time * (1 + SLOT_GAIN):
            break
        plan = fewer
    return plan


def _share(problem: Problem, plan: Plan, wanted: Place, *others: Place) -> float:
    counted = dict.fromkeys((wanted, *others), 0)
    for subgroup, place in zip(problem.subgroups, plan.places, strict=True):
        if place in counted:
            counted[place] += subgroup.numel
    total = sum(counted.values())
    return counted[wanted] / total if total else 0.0


def _check_host(problem: Problem, plan: Plan) -> None:
    limit = problem.window.host_bytes
    if over_host(problem, plan):
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
        if over_host(problem, replace(plan, early_gradients=True)):
            reason = f"host_bytes {problem.window.host_bytes} hold no more"
        else:
            reason = "in it they would hold up what is needed first"
        yield f"gradients go to the host after the backward pass: {reason}"
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
