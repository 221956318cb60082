"""``pretrain verify layout``: the same training on a list of layouts, each compared with the first, as a table."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.exit_codes import ExitCode
from launchers.run_dir import RunDir
from pretrain.config.violation import InvalidConfigError
from pretrain.verify.compare import Tolerance, deviation, state_divergence
from pretrain.verify.experiment import Experiment
from pretrain.verify.runs import RunFailedError, finish
from pretrain.verify.traces import AttemptTrace, read_attempt

Say = Callable[[str], None]

_INITIAL_SLOTS = ("master", "weight", "buffer")  # moments are zeros or not there yet, as the engine likes


@dataclass(frozen=True)
class Layout:
    """A name for the table and the overrides that make the layout."""

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """``NAME: overrides``. Raises ValueError for anything else."""
        name, colon, rest = text.partition(":")
        if not colon or not name.strip() or "=" in name:
            raise ValueError(
                f"--layouts: found {text!r}, expected 'NAME: overrides', such as "
                "'ZeRO-2 x 2: engine.zero_stage=2 launcher.num_processes=2', in quotes"
            )
        return cls(name.strip(), tuple(shlex.split(rest)))


def _deepspeed(name: str, processes: int, *settings: str) -> Layout:
    return Layout(name, ("engine=deepspeed", f"launcher.num_processes={processes}", *settings))


def _megatron(name: str, processes: int, *settings: str) -> Layout:
    return Layout(name, ("engine=megatron", f"launcher.num_processes={processes}", *settings))


_HOST_STATE = (
    "optimizer.offload.enabled=true",
    "optimizer.offload.fraction=0.5",
    # Several subgroups of small models too.
    "optimizer.offload.subgroup_size=50000",
)

DEFAULT_LAYOUTS = (
    _deepspeed("plain", 1, "engine.zero_stage=0"),
    *(_deepspeed(f"ZeRO-{stage} x 2", 2, f"engine.zero_stage={stage}") for stage in range(4)),
    _deepspeed("ZeRO-1 x 2 offload", 2, "engine.zero_stage=1", "engine.offload_optimizer=true"),
    _deepspeed(
        "ZeRO-3 x 2 offload",
        2,
        "engine.zero_stage=3",
        "engine.offload_optimizer=true",
        "engine.offload_parameters=true",
    ),
    _deepspeed("ZeRO-3 x 2 host state", 2, "engine.zero_stage=3", *_HOST_STATE),
    _megatron("Megatron TP2", 2, "engine.tensor_parallel=2"),
    _megatron("Megatron TP2+SP", 2, "engine.tensor_parallel=2", "engine.sequence_parallel=true"),
    _megatron("Megatron PP2", 2, "engine.pipeline_parallel=2"),
    _megatron("Megatron DP2", 2),
    _megatron("Megatron DP2 host state", 2, *_HOST_STATE),
    _megatron("Megatron TP2xPP2", 4, "engine.tensor_parallel=2", "engine.pipeline_parallel=2"),
)


@dataclass(frozen=True)
class _Row:
    """One line of the table. ``is_fault``: the layout is not what the first one is, broke, or had to run and was
    refused."""

    layout: str
    verdict: str
    ranks: str = "-"
    loss: str = "-"
    grad_norm: str = "-"
    initial: str = "-"
    samples: str = "-"
    is_fault: bool = False

    def cells(self) -> list[str]:
        return [self.layout, self.ranks, self.loss, self.grad_norm, self.initial, self.samples, self.verdict]


_HEAD = _Row(
    "layout", "verdict", "ranks", "max |Δloss|", "max rel Δgrad norm", "initial weights", "sample ids"
).cells()  # fmt: skip


class _Table:
    """Lines of fixed columns, each said when its run has ended; the last column has no width."""

    def __init__(self, names: Sequence[str], say: Say) -> None:
        self._widths = [max(map(len, [_HEAD[0], *names])), *map(len, _HEAD[1:-1])]
        self._say = say
        self._line(_HEAD)
        self._say("  ".join("-" * width for width in [*self._widths, len(_HEAD[-1])]))

    def add(self, row: _Row) -> None:
        self._line(row.cells())

    def _line(self, cells: list[str]) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, self._widths, strict=False)]
        self._say("  ".join([*padded, cells[-1]]).rstrip())


def verify_layout(
    experiment: Experiment, layouts: Sequence[Layout], steps: int, folder: Path, say: Say, *, must_run: bool
) -> bool:
    """Run every layout in ``folder`` and say a table.

    Returns whether at least one was compared with the first, none diverges from it or breaks and, where all
    ``must_run``, none was refused.

    Raises:
        ValueError: bad input, or a first layout that the configuration refuses.
        RunFailedError: the first layout's run failed.
    """
    names = [layout.name for layout in layouts]
    if len(names) < 2:
        raise ValueError(
            f"--layouts: found only {', '.join(map(repr, names))}, expected at least two; the first is what the others "
            "are compared with"
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--layouts: names found twice: {', '.join(repeated)}; give every layout its own")
    base = experiment.with_overrides([f"train.steps={steps}", "train.checkpoint_interval=0"])
    _, config = base.with_overrides(layouts[0].overrides).check()
    tolerance = base.tolerance(config)
    say(
        f"{steps} steps of {config.train.global_batch_size} samples in {config.train.precision}, each layout against "
        f"'{names[0]}'; tolerance: loss {tolerance.loss:.0e} nats, gradient norm {tolerance.grad_norm:.0e} relative"
    )
    table = _Table(names, say)
    traces: dict[str, AttemptTrace] = {}
    faults = 0
    for number, layout in enumerate(layouts):
        place = folder / f"{number:02d}-{re.sub(r'[^A-Za-z0-9._+-]+', '_', layout.name)}"
        if not traces:
            traces[layout.name], seconds = _traced(base, layout, place)
            ranks = str(len(traces[layout.name].start.records))
            row = _Row(layout.name, f"the reference, {seconds:.0f} s", ranks, "0", "0", "-", "-")
        else:
            row = _row(base, layout, place, traces, range(1, steps + 1), tolerance, must_run)
        table.add(row)
        faults += row.is_fault
    if len(traces) == 1:
        say(f"nothing was compared: every layout but '{names[0]}' was refused or failed")
        return False
    return faults == 0


def _traced(base: Experiment, layout: Layout, place: Path) -> tuple[AttemptTrace, float]:
    """Run ``layout`` in ``place``: its trace and the seconds it took."""
    experiment = base.with_overrides(layout.overrides)
    _, config = experiment.check()
    seconds = finish(layout.name, place.with_name(place.name + ".log"), experiment.run_arguments(place))
    return read_attempt(RunDir(place).trace_path(1), config.launcher.num_processes), seconds


def _row(
    base: Experiment,
    layout: Layout,
    place: Path,
    traces: dict[str, AttemptTrace],
    steps: range,
    tolerance: Tolerance,
    must_run: bool,
) -> _Row:
    """Run ``layout`` and compare it with the first of ``traces`` (by layout), to which its own is added."""
    started = time.perf_counter()
    try:
        trace, _ = _traced(base, layout, place)
    except InvalidConfigError as error:
        reasons = "; ".join(f"{v.path}: {' '.join(v.rule.split())} (found {v.found!r})" for v in error.violations)
        return _Row(layout.name, f"refused: {reasons}", is_fault=must_run)
    except RunFailedError as error:
        refused = error.code == ExitCode.INVALID_INPUT
        word = "refused" if refused else f"FAILED with code {error.code}"
        return _Row(layout.name, f"{word}:\n{error.reason}", is_fault=must_run or not refused)
    seconds = f", {time.perf_counter() - started:.0f} s"
    reference = next(iter(traces.values()))
    twin = next((name for name, other in traces.items() if _is_bitwise(other, trace, steps)), None)
    traces[layout.name] = trace
    initial = state_divergence(reference.start, trace.start, _INITIAL_SLOTS)
    gap = deviation(reference.steps, trace.steps, steps, tolerance)
    same_samples = all(
        step in trace.steps and trace.steps[step].sample_ids == reference.steps[step].sample_ids for step in steps
    )
    fault = initial or gap.divergence
    if fault:
        verdict = f"DIVERGED at {fault}"
    elif gap.is_bitwise:
        verdict = "bitwise"
    else:
        verdict = f"within {gap.loss:.0e} (tolerance {tolerance.loss:.0e})"
        if twin is not None:
            verdict += f", bitwise as {twin}"
    return _Row(
        layout.name,
        verdict + seconds,
        ranks=str(len(trace.start.records)),
        loss=f"{gap.loss:.1e}" if gap.loss else "0",
        grad_norm=f"{gap.grad_norm:.1e}" if gap.grad_norm else "0",
        initial="DIFFERENT" if initial else "bitwise",
        samples="equal" if same_samples else "DIFFERENT",
        is_fault=fault is not None,
    )


def _is_bitwise(left: AttemptTrace, right: AttemptTrace, steps: range) -> bool:
    return deviation(left.steps, right.steps, steps, Tolerance(0, 0)).is_bitwise
