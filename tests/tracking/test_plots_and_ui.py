"""The loss curve as a picture, and the user interface's process handling."""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.tracking import ui
from pretrain.tracking.plots import plot_loss_curve, smooth


def _records(num_steps: int) -> list[dict]:
    records = []
    for step in range(1, num_steps + 1):
        metrics = {"loss": 8.0 / math.sqrt(step), "learning_rate": 1e-3 * min(1.0, step / 10)}
        records.append({"time": 0.0, "attempt": 1, "event": "train", "step": step, "metrics": metrics})
        if step % 20 == 0:
            metrics = {"validation_loss": 8.2 / math.sqrt(step), "validation_bits_per_byte": 4.1 / math.sqrt(step)}
            records.append({"time": 0.0, "attempt": 1, "event": "eval", "step": step, "metrics": metrics})
    return records


@pytest.mark.parametrize("num_steps", [0, 1, 100])
def test_the_curve_is_a_png_of_the_promised_size(tmp_path: Path, num_steps: int) -> None:
    path = tmp_path / "loss_curve.png"
    plot_loss_curve(_records(num_steps), path, baselines={"bigram": 2.9, "xz": 1.9})
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert (width, height) == (1200, 780)


def test_smoothing_neither_lags_nor_bends_a_line() -> None:
    line = [2.0 - 0.5 * step for step in range(11)]
    assert smooth(line, 3) == pytest.approx(line)
    assert smooth([0.0, 3.0, 0.0], 1) == pytest.approx([0.0, 1.0, 0.0])
    assert smooth([1.0, 5.0], 0) == [1.0, 5.0]


def test_ui_without_a_store_says_how_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    parser = argparse.ArgumentParser()
    ui.add_arguments(parser)
    assert ui.run(parser.parse_args(["--store", str(tmp_path)])) == 2
    assert "pretrain run" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert ui.run(parser.parse_args([])) == 0
    assert "http://server:5000" in capsys.readouterr().out


_PARENT = """
import os, sys
from pretrain.tracking.ui import run_until_signal
sys.exit(run_until_signal([sys.executable, "-c", sys.argv[1], sys.argv[2]], dict(os.environ), grace_s=0.2))
"""
_SERVER = """
import os, signal, subprocess, sys, time
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + ".part", "w").write(f"{{os.getpid()}} {{worker.pid}}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""


@pytest.mark.parametrize(("sent", "stubborn"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_ending_the_ui_ends_the_server_and_its_workers(tmp_path: Path, sent: signal.Signals, stubborn: bool) -> None:
    note = tmp_path / "pids"
    root = Path(ui.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", _PARENT, _SERVER.format(stubborn=stubborn), str(note)], cwd=root, env=os.environ
    )
    while not note.exists():
        assert process.poll() is None
        time.sleep(0.02)
    servers = [psutil.Process(int(pid)) for pid in note.read_text().split()]
    process.send_signal(sent)
    assert process.wait(60) == 0
    _, alive = psutil.wait_procs(servers, timeout=30)
    assert not [server for server in alive if server.status() != psutil.STATUS_ZOMBIE]


def test_a_server_that_fails_passes_its_code_on() -> None:
    assert ui.run_until_signal([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == 3
