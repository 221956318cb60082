"""The progress display in both forms, fed by the records that training writes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launchers.progress import LiveProgress, PlainProgress, ProgressState, format_duration, open_display, render
from launchers.run_dir import RunDir
from pretrain.tracking.metrics_log import MetricsLog, MetricsTail

TRAIN = {
    "loss": 3.25,
    "learning_rate": 3e-4,
    "grad_norm": 0.5,
    "tokens_per_s": 12345.0,
    "step_s": 0.4,
    "data_s": 0.04,
    "forward_s": 0.1,
    "backward_s": 0.2,
    "optimizer_s": 0.06,
    "memory_gib": 1.5,
}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _write_some(run: RunDir, attempt: int = 1) -> None:
    with MetricsLog(run.metrics_path, attempt) as log:
        log.write("phase", name="building model and engine")
        log.write("start", 0, steps=10, world_size=2)
        log.write("train", 1, metrics=TRAIN)
        log.write("train", 2, metrics=TRAIN)
        log.write("eval", 2, metrics={"validation_loss": 3.5, "validation_bits_per_byte": 1.75})
        log.write("sample", 2, prompt="def ", text="[bold]f[/bold]:\n    pass")
        log.write("checkpoint", 2, path="step_00000002", seconds=0.25, stall_s=0.03)
        log.write("custom", 2, note="hello")


def test_plain_lines_one_an_event_without_markup(run: RunDir) -> None:
    stream = io.StringIO()
    display = open_display(run, 1, stream=stream)
    assert isinstance(display, PlainProgress)
    assert "starting processes" in stream.getvalue()
    _write_some(run)
    display.poll()
    with MetricsLog(run.metrics_path, 1) as log:
        log.write("end", status="interrupted", message="SIGTERM")
    display.poll()
    display.close()
    lines = [line.partition(" ")[2] for line in stream.getvalue().splitlines()]
    assert len(lines) == 10
    assert lines[2] == "started: 10 steps on 2 process(es)"
    assert lines[3].startswith("step 1/10  loss 3.2500  lr 3.00e-04  grad norm 0.500  12,345 tokens/s  step 0.400 s")
    assert "(data 0.040 forward 0.100 backward 0.200 optimizer 0.060)  memory 1.50 GiB  ETA 0:04" in lines[3]
    assert lines[5] == "step 2/10  validation loss 3.5000  validation bits per byte 1.7500"
    assert lines[6] == "step 2/10  sample: 'def ' -> '[bold]f[/bold]:\\n    pass'"
    assert lines[7] == "step 2/10  checkpoint saved in 0.2 s (training stood still for 0.03 s): step_00000002"
    assert lines[9] == "step 2/10  interrupted: SIGTERM"
    assert "\x1b" not in stream.getvalue()


def test_earlier_attempts_are_not_shown(run: RunDir) -> None:
    _write_some(run, attempt=1)
    stream = io.StringIO()
    display = open_display(run, 2, stream=stream)
    _write_some(run, attempt=1)
    display.poll()
    assert len(stream.getvalue().splitlines()) == 1


def test_the_live_panel_shows_numbers_split_and_events(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = _Terminal()
    display = open_display(run, 1, stream=stream)
    assert isinstance(display, LiveProgress)
    assert "starting processes" in stream.getvalue()
    _write_some(run)
    display.poll()
    display.close()
    last = stream.getvalue().rpartition("starting processes")[2]
    for expected in (
        "12,345",
        "3.2500",
        "3.5000",
        "1.7500",
        "3.00e-04",
        "1.50",
        "backward 0.200 s 50%",
        "data 0.040 s 10%",
    ):
        assert expected in last, expected
    assert "checkpoint saved" in last
    assert "[bold]f[/bold]" in last  # text of the model is shown, not taken for markup
    assert "\x1b[" in stream.getvalue()


def test_slurm_and_dumb_terminals_get_plain_lines(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert isinstance(open_display(run, 1, stream=_Terminal()), PlainProgress)
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display(run, 1, stream=_Terminal()), PlainProgress)


def test_eta_follows_the_pace_of_this_attempt() -> None:
    state = ProgressState("run", attempt=2)
    assert state.eta_s is None
    base = {"attempt": 2, "time": 1000.0}
    state.update({**base, "event": "start", "step": 100, "steps": 200, "world_size": 1})
    state.update({**base, "event": "train", "step": 101, "metrics": {"step_s": 2.0}})
    assert state.eta_s == pytest.approx(99 * 2.0)
    # Ten steps in thirty seconds, whatever the time of the step alone: evaluations count.
    state.update({**base, "time": 1030.0, "event": "train", "step": 111, "metrics": {"step_s": 2.0}})
    assert state.eta_s == pytest.approx(89 * 3.0)


@pytest.mark.parametrize("width", [30, 80, 200])
def test_the_panel_renders_at_any_width_and_stage(width: int) -> None:
    console = Console(record=True, force_terminal=True, width=width, file=io.StringIO())
    state = ProgressState("demo-20250101-000000", attempt=1, started=0.0)
    console.print(render(state, now=65.0))
    state.update({"attempt": 1, "time": 1.0, "event": "start", "step": 0, "steps": 10, "world_size": 2})
    state.update({"attempt": 1, "time": 2.0, "event": "train", "step": 1, "metrics": TRAIN})
    state.update({"attempt": 1, "time": 3.0, "event": "end", "status": "finished"})
    console.print(render(state, now=65.0))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    if width > 30:
        assert "1:05" in text
        assert "finished" in text


def test_tail_never_shows_half_a_line(run: RunDir) -> None:
    tail = MetricsTail(run.metrics_path)
    assert tail.read() == []
    line = b'{"time": 1, "attempt": 1, "event": "phase", "name": "x"}\n'
    with open(run.metrics_path, "ab", buffering=0) as stream:
        for byte in line[:-1]:
            stream.write(bytes([byte]))
            assert tail.read() == []
        stream.write(b"\n")
    assert [record["name"] for record in tail.read()] == ["x"]
    assert tail.offset == len(line)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90061, "25:01:01"), (-3, "0:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
