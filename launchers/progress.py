"""What a running attempt shows its user, read from ``metrics.jsonl`` in the launcher's process.

A live panel on a terminal; one plain line an event when output is not a terminal or the run is under Slurm.
The ranks never draw: showing progress costs training nothing but the lines it logs anyway.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from launchers.run_dir import RunDir
from pretrain.tracking.metrics_log import MetricsTail, Record

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_REDRAW_INTERVAL_S = 0.5
_SPLIT = ("data", "forward", "backward", "optimizer")


def format_duration(seconds: float) -> str:
    """``h:mm:ss`` or ``m:ss``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class ProgressState:
    """The attempt so far, folded from its records. ``steps`` counts optimizer steps of the whole run."""

    title: str
    attempt: int
    started: float = field(default_factory=time.time)
    phase: str = "starting processes"
    step: int = 0
    steps: int | None = None
    world_size: int | None = None
    train: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    events: deque[str] = field(default_factory=lambda: deque(maxlen=4))
    status: str | None = None
    _first: tuple[int, float] | None = None
    _last_time: float = 0.0

    def update(self, record: Record) -> str | None:
        """Folds one record in; returns its one-line description, None when it is of another attempt."""
        if record.get("attempt") != self.attempt:
            return None
        line = getattr(self, f"_on_{record['event']}", self._on_other)(record)
        assert isinstance(line, str)
        if record["event"] not in ("train", "phase"):
            self.events.append(f"{time.strftime('%H:%M:%S', time.localtime(record['time']))}  {line}")
        return line

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at this attempt's pace so far, evaluations and checkpoints included."""
        if self.steps is None or not self.train:
            return None
        pace = self.train.get("step_s")
        if self._first is not None and self.step > self._first[0]:
            pace = (self._last_time - self._first[1]) / (self.step - self._first[0])
        return None if pace is None else max(0, self.steps - self.step) * pace

    def _where(self, record: Record) -> str:
        step = record.get("step", self.step)
        return f"step {step}" + (f"/{self.steps}" if self.steps is not None else "")

    def _on_start(self, record: Record) -> str:
        self.step = record.get("step", 0)
        self.steps = record.get("steps")
        self.world_size = record.get("world_size")
        self.phase = "first step"
        origin = "started" if self.step == 0 else f"continuing after step {self.step}"
        return f"{origin}: {self.steps} steps on {self.world_size} process(es)"

    def _on_phase(self, record: Record) -> str:
        self.phase = str(record["name"])
        return self.phase

    def _on_train(self, record: Record) -> str:
        self.step, self.train, self._last_time = record["step"], record["metrics"], record["time"]
        self.phase = "training"
        if self._first is None:
            self._first = (self.step, record["time"])
        eta = self.eta_s
        words = [self._where(record), *describe_train(self.train)]
        return "  ".join(words if eta is None else [*words, f"ETA {format_duration(eta)}"])

    def _on_eval(self, record: Record) -> str:
        self.evaluation = record["metrics"]
        values = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.evaluation.items())
        return f"{self._where(record)}  {values}"

    def _on_checkpoint(self, record: Record) -> str:
        seconds = f" in {record['seconds']:.1f} s" if "seconds" in record else ""
        if "stall_s" in record:
            seconds += f" (training stood still for {record['stall_s']:.2f} s)"
        return f"{self._where(record)}  checkpoint saved{seconds}: {record.get('path', '')}"

    def _on_health(self, record: Record) -> str:
        first, last = record.get("sample_ids", ["?", "?"])
        going = {
            "skip": "left out",
            "rollback": f"going back to step {record.get('to_step')} without batches {record.get('skipped')}",
        }.get(record["action"], "stopping")
        if "to_step" in record:
            self.step = record["to_step"]
        return (
            f"{self._where(record)}  {record['kind']}: loss {record.get('loss')}, grad norm {record.get('grad_norm')}, "
            f"samples {first}..{last}: {going}"
        )

    def _on_sample(self, record: Record) -> str:
        return f"{self._where(record)}  sample: {record.get('prompt', '')!r} -> {record.get('text', '')!r}"

    def _on_end(self, record: Record) -> str:
        self.status = self.phase = str(record["status"])
        message = record.get("message")
        return f"{self._where(record)}  {self.status}" + (f": {message}" if message else "")

    def _on_other(self, record: Record) -> str:
        known = ("time", "attempt", "event")
        rest = "  ".join(f"{name} {value}" for name, value in record.items() if name not in known)
        return f"{record['event']}  {rest}"


def describe_train(metrics: dict[str, float]) -> list[str]:
    """Loss, rate, speed, time split and memory of one training record, leaving out what it does not hold."""
    words = []
    for name, label, form in (
        ("loss", "loss", ".4f"),
        ("learning_rate", "lr", ".2e"),
        ("grad_norm", "grad norm", ".3f"),
    ):
        if name in metrics:
            words.append(f"{label} {metrics[name]:{form}}")
    if "tokens_per_s" in metrics:
        words.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    if "step_s" in metrics:
        split = " ".join(f"{part} {metrics[f'{part}_s']:.3f}" for part in _SPLIT if f"{part}_s" in metrics)
        words.append(f"step {metrics['step_s']:.3f} s" + (f" ({split})" if split else ""))
    for name, value in metrics.items():
        if name.endswith("_gib"):
            words.append(f"{name.removesuffix('_gib').replace('_', ' ')} {value:.2f} GiB")
    return words


class PlainProgress:
    """One line an event, each with its time of day, for logs and pipes."""

    def __init__(self, state: ProgressState, tail: MetricsTail, stream: TextIO) -> None:
        self._state, self._tail, self._stream = state, tail, stream
        self._write(f"{state.title}, attempt {state.attempt}: {state.phase}", time.time())

    def poll(self) -> None:
        """Writes a line for each new record."""
        for record in self._tail.read():
            line = self._state.update(record)
            if line is not None:
                self._write(line, record["time"])

    def close(self) -> None:
        self._stream.flush()

    def _write(self, line: str, when: float) -> None:
        print(time.strftime("%H:%M:%S", time.localtime(when)), line, file=self._stream, flush=True)


class LiveProgress:
    """A panel redrawn in place, on new records and at least every half second."""

    def __init__(self, state: ProgressState, tail: MetricsTail, console: Console) -> None:
        from rich.live import Live

        self._state, self._tail = state, tail
        self._drawn = time.monotonic()
        # Drawn from poll alone: a refresh thread would compete with the ranks for cores.
        self._live = Live(render(state), console=console, auto_refresh=False)
        self._live.start(refresh=True)

    def poll(self) -> None:
        """Takes in new records; redraws when half a second has passed."""
        for record in self._tail.read():
            self._state.update(record)
        if time.monotonic() - self._drawn >= _REDRAW_INTERVAL_S:
            self._draw()

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._live.update(render(self._state), refresh=True)
        self._drawn = time.monotonic()


def render(state: ProgressState, now: float | None = None) -> RenderableType:
    """The live panel as a rich renderable; ``now`` in unix seconds (default: the clock)."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    elapsed = format_duration((time.time() if now is None else now) - state.started)
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    total = state.steps or 0
    eta = state.eta_s
    head.add_row(
        f"[bold]{state.step}[/]/{state.steps if state.steps is not None else '?'}",
        ProgressBar(total=total or None, completed=state.step, pulse=not total),
        f"elapsed {elapsed}  ETA {format_duration(eta) if eta is not None else '-'}",
    )
    parts: list[RenderableType] = [head]
    if state.train or state.evaluation:
        parts += [Text(), _numbers(state), *_split(state.train)]
    if state.events:
        parts.append(Text())
        parts += [
            Text(line.replace("\n", " "), style="dim", no_wrap=True, overflow="ellipsis") for line in state.events
        ]
    world = f", {state.world_size} process(es)" if state.world_size else ""
    style = {"finished": "green", "interrupted": "yellow", "failed": "red"}.get(state.phase, "cyan")
    title = Text.assemble((state.title, "bold"), f" attempt {state.attempt}{world} ", (state.phase, style))
    return Panel(Group(*parts), title=title, title_align="left", border_style=style)


def _numbers(state: ProgressState) -> RenderableType:
    from rich.table import Table

    cells: list[tuple[str, str]] = []

    def add(label: str, source: dict[str, float], name: str, form: str) -> None:
        if name in source:
            cells.append((label, format(source[name], form)))

    add("loss", state.train, "loss", ".4f")
    add("validation loss", state.evaluation, "validation_loss", ".4f")
    add("bits per byte", state.evaluation, "validation_bits_per_byte", ".4f")
    add("accuracy", state.evaluation, "validation_accuracy", ".4f")
    add("exact match", state.evaluation, "validation_exact_match", ".4f")
    add("tokens/s", state.train, "tokens_per_s", ",.0f")
    add("learning rate", state.train, "learning_rate", ".2e")
    add("gradient norm", state.train, "grad_norm", ".3f")
    for name in state.train:
        if name.endswith("_gib"):
            add(f"{name.removesuffix('_gib').replace('_', ' ')} GiB", state.train, name, ".2f")
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in cells:
        table.add_column(justify="left", no_wrap=True)
    table.add_row(*(f"[dim]{label}[/]" for label, _ in cells))
    table.add_row(*(f"[bold]{value}[/]" for _, value in cells))
    return table


def _split(train: dict[str, float]) -> list[RenderableType]:
    """Where a step's time goes, in seconds and percent."""
    from rich.text import Text

    total = train.get("step_s")
    if not total:
        return []
    line = Text(f"step {total:.3f} s  ")
    colors: dict[str, str] = dict(zip(_SPLIT, ("yellow", "green", "blue", "magenta"), strict=True))
    for part in _SPLIT:
        seconds: Any = train.get(f"{part}_s")
        if seconds is not None:
            line.append(f"  {part} {seconds:.3f} s {100 * seconds / total:.0f}%", style=colors[part])
    return [Text(), line]


def open_display(run: RunDir, attempt: int, *, stream: TextIO | None = None) -> PlainProgress | LiveProgress:
    """The display that fits ``stream`` (default: standard output); it follows ``run`` from now on."""
    stream = stream or sys.stdout
    state = ProgressState(run.path.name, attempt)
    try:
        offset = os.stat(run.metrics_path).st_size
    except FileNotFoundError:
        offset = 0
    tail = MetricsTail(run.metrics_path, offset)
    if not stream.isatty() or "SLURM_JOB_ID" in os.environ or os.environ.get("TERM") == "dumb":
        return PlainProgress(state, tail, stream)
    from rich.console import Console

    return LiveProgress(state, tail, Console(file=stream))
