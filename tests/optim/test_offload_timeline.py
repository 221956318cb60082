"""Timelines: what they say of a step, the trace's format, the picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.plan import make_plan
from pretrain.optim.offload.schedule import Kind, Operation, Plan, Queue
from pretrain.optim.offload.simulate import Timed, simulate
from pretrain.optim.offload.subgroups import Subgroup, Target, cut_subgroups
from pretrain.optim.offload.timeline import (
    BACKWARD,
    FORWARD,
    UPDATE,
    Phase,
    Side,
    link_rates,
    measured_side,
    predicted_side,
    write_trace,
)
from pretrain.optim.offload.timeline_plot import _COLORS, plot_timeline

CONSTANTS = Constants(50e9, 48e9, 44e9, 43e9, 0.85, 2.2e9, 1.7e9, 8e10)
WIDTHS = Widths()
WINDOW = Window(device_bytes=4 * 10**9, early_bytes=10**9, backward_s=0.02, forward_s=0.02)


def _planned() -> tuple[tuple[Subgroup, ...], Plan]:
    subgroups = cut_subgroups([Target(950_000_000, 0)], 100_000_000)
    return subgroups, make_plan(subgroups, CONSTANTS, WIDTHS, WINDOW, resident_fraction=0.1).plan


def _both() -> tuple[tuple[Subgroup, ...], Side, Side]:
    subgroups, plan = _planned()
    predicted = predicted_side(plan, subgroups, CONSTANTS, WIDTHS, WINDOW)
    slower = [Timed(t.operation, 1.1 * t.start, 1.1 * t.end) for t in predicted.operations]
    measured = measured_side(slower, [Phase(BACKWARD, -0.03, 0.0)], 1.1 * predicted.update_s, WINDOW.forward_s)
    return subgroups, measured, predicted


def test_a_prediction_is_the_simulator_s() -> None:
    subgroups, plan = _planned()
    side = predicted_side(plan, subgroups, CONSTANTS, WIDTHS, WINDOW)
    found = simulate(plan, subgroups, CONSTANTS, WIDTHS, WINDOW)
    assert (side.update_s, side.exposed_s, side.operations) == (found.update_s, found.exposed_s, found.operations)
    assert {phase.name for phase in side.phases} == {BACKWARD, FORWARD, UPDATE}


def test_on_the_host_one_thing_comes_after_the_other() -> None:
    subgroups, plan = _planned()
    side = predicted_side(plan, subgroups, CONSTANTS, WIDTHS, WINDOW, serial=True)
    assert all(a.end == b.start for a, b in zip(side.operations, side.operations[1:], strict=False))
    # What comes early ends where the update begins, and is no part of it.
    early = side.operations[: plan.num_early]
    assert early
    assert early[-1].end == pytest.approx(0.0)
    assert side.update_s == pytest.approx(sum(t.end - t.start for t in side.operations[plan.num_early :]))
    whole = predicted_side(plan, subgroups, CONSTANTS, WIDTHS, Window(), serial=True)
    assert whole.operations[0].start == 0
    assert whole.update_s == pytest.approx(side.update_s - early[0].start)


def test_what_flows_back_after_the_forward_pass_is_exposed() -> None:
    flush = Timed(Operation(Kind.FLUSH, 0), 0.5, 2.0)
    assert measured_side([flush], [], 1.0, forward_s=0.25).exposed_s == 1.75
    assert measured_side([flush], [], 1.0, forward_s=1.5).exposed_s == 1.0


def test_a_queue_that_waits_stalls() -> None:
    first, second = Operation(Kind.CPU_UPDATE, 0), Operation(Kind.CPU_UPDATE, 1)
    side = measured_side([Timed(first, 0.2, 0.5), Timed(second, 0.75, 1.0)], [], 1.0, 0.0)
    assert side.stalls() == [(Queue.CPU, 0.0, 0.2), (Queue.CPU, 0.5, 0.75)]
    full = measured_side([Timed(first, 0.0, 0.5), Timed(second, 0.5, 1.0)], [], 1.0, 0.0)
    assert full.stalls() == []


def test_rates_count_time_with_something_under_way_once() -> None:
    subgroups = cut_subgroups([Target(2000, 0)], 1000)
    up = [Timed(Operation(Kind.PREFETCH, 0), 0.0, 2.0), Timed(Operation(Kind.WEIGHT_UP, 1), 1.0, 3.0)]
    side = measured_side(up, [], 4.0, 0.0)
    assert link_rates(side, subgroups, WIDTHS) == (14_000 / 3.0, 0.0)


def test_the_trace_is_one_that_viewers_take(tmp_path: Path) -> None:
    subgroups, measured, predicted = _both()
    path = tmp_path / "offload" / "step_7_rank_3.json"
    write_trace(path, [measured, predicted], subgroups, WIDTHS, rank=3, step=7)
    trace: dict[str, Any] = json.loads(path.read_text())
    assert trace["displayTimeUnit"] in ("ms", "ns")
    names: dict[tuple[int, int], str] = {}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert event["ph"] in ("X", "M")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            assert event["args"].keys() == {"name" if event["name"].endswith("_name") else "sort_index"}
            if event["name"] == "thread_name":
                names[event["pid"], event["tid"]] = event["args"]["name"]
        else:
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert isinstance(event["cat"], str)
    processes = {e["args"]["name"]: e["pid"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert processes.keys() == {"rank 3: measured", "rank 3: predicted"}
    assert set(names.values()) == {"model", *(queue.value for queue in Queue)}
    # Microseconds, one clock for both: an operation begins as far from the update as it was measured to.
    begins = trace["otherData"]["update_begins_us"]
    for side, pid in ((measured, processes["rank 3: measured"]), (predicted, processes["rank 3: predicted"])):
        found = {
            (e["name"], names[pid, e["tid"]]): (e["ts"], e["dur"])
            for e in trace["traceEvents"]
            if e["pid"] == pid and e.get("cat") == "operation"
        }
        assert len(found) == len(side.operations)
        for timed in side.operations:
            operation = timed.operation
            ts, duration = found[f"{operation.kind.value} {operation.subgroup}", operation.queue.value]
            assert ts - begins == pytest.approx(timed.start * 1e6, abs=0.01)
            assert duration == pytest.approx((timed.end - timed.start) * 1e6, abs=0.01)
    # Operations of one queue do not overlap: a track can show them.
    for key in names:
        spans = sorted(
            (e["ts"], e["ts"] + e["dur"])
            for e in trace["traceEvents"]
            if (e["pid"], e["tid"]) == key and e["ph"] == "X" and e["cat"] in ("operation", "stall")
        )
        assert all(a[1] <= b[0] + 0.01 for a, b in itertools.pairwise(spans))


def test_the_picture_has_both_panels(tmp_path: Path) -> None:
    _, measured, predicted = _both()
    both, one = tmp_path / "new" / "both.png", tmp_path / "one.png"
    plot_timeline(both, [measured, predicted], title="step 7")
    plot_timeline(one, [measured], title="step 7")
    assert matplotlib.image.imread(both).shape[0] > 1.5 * matplotlib.image.imread(one).shape[0]


@pytest.mark.parametrize("seed", range(12))
def test_no_slice_overlaps_its_neighbour_by_a_nanosecond(tmp_path: Path, seed: int) -> None:
    pick = random.Random(seed)
    subgroups, plan = _planned()
    constants = dataclasses.replace(CONSTANTS, h2d=pick.uniform(2e10, 6e10), cpu_adam=pick.uniform(1e9, 3e9))
    side = predicted_side(plan, subgroups, constants, WIDTHS, WINDOW)
    path = tmp_path / "trace.json"
    write_trace(path, [side], subgroups, WIDTHS, rank=0, step=1)
    tracks: dict[int, list[tuple[int, int]]] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            begin = round(event["ts"] * 1000)
            tracks.setdefault(event["tid"], []).append((begin, begin + round(event["dur"] * 1000)))
    for slices in tracks.values():
        for (_, end), (begin, _) in itertools.pairwise(sorted(slices)):
            assert end <= begin


def test_operations_shorter_than_a_pixel_are_seen(tmp_path: Path) -> None:
    subgroups = cut_subgroups([Target(2_000_000_000, 0)], 100_000_000)
    plan = make_plan(subgroups, CONSTANTS, WIDTHS, WINDOW, fraction=1.0, resident_fraction=0.0, overlap=False).plan
    side = predicted_side(plan, subgroups, CONSTANTS, WIDTHS, Window())
    path = tmp_path / "timeline.png"
    plot_timeline(path, [side], title="")
    pixels = matplotlib.image.imread(path)[..., :3]
    green = [int(_COLORS[Kind.DEVICE_UPDATE][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    # Below the legend's patch there is one of that color for each operation, at least a pixel wide.
    rows = (abs(pixels - green) < 0.12).all(axis=2)[: int(0.7 * len(pixels))]
    assert rows.any(axis=0).sum() >= len(plan.streamed)
