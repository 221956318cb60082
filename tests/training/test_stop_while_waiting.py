"""A rank that waits for something still answers a stop request: at start-up, for data, and in validation."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.loader import StepLoader
from launchers.exit_codes import ExitCode
from launchers.heartbeat import read_heartbeats
from launchers.run_dir import RunDir
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.check import check
from pretrain.config.compose import load_run_config
from pretrain.config.freeze import frozen_for_new_run
from pretrain.training.signals import StopRequest, StopRequestedError

ROOT = Path(__file__).parents[2]

PACKAGE = '''
"""A linear map, and sources of which rank 1 waits for ever at a chosen place."""
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(3, 1)

    def forward(self, x):
        return self.map(x)


@dataclass
class Loss:
    loss_sum: torch.Tensor
    metrics: dict


class Squares:
    def denominator(self, batch):
        return float(batch["y"].numel())

    def __call__(self, model, batch):
        return Loss(((model(batch["x"]) - batch["y"]) ** 2).sum(), {})


def stall(marker):
    if os.environ["SLURM_PROCID"] == "1":
        Path(marker).touch()
        stuck.append(marker)
        threading.Event().wait()


stuck = []


class Points:
    fingerprint = "points"
    num_bytes = None

    def __init__(self, marker, stalls_from, num_samples):
        self.marker, self.stalls_from, self.num_samples = marker, stalls_from, num_samples

    def batch(self, indices):
        if self.stalls_from is not None and max(indices) >= self.stalls_from:
            stall(self.marker)
        x = np.ones((len(indices), 3), dtype=np.float32)
        return {"x": x, "y": x[:, :1]}

    def close(self):
        assert not stuck or self.stalls_from is None, "closed under a thread that is stuck in it"


@dataclass
class Sources:
    train: Points
    validation: Points
    tokenizer_path: None = None


def sources(place, marker):
    if place == "opening":
        stall(marker)
    return Sources(
        Points(marker, 11 if place == "training" else None, None),
        Points(marker, 2 if place == "validation" else None, 8),
    )
'''

EXPERIMENT = """
# @package _global_
defaults:
  - override /tracking: disabled
  - override /model: m
  - override /data: d
  - override /objective: o
run: {name: waits, import_paths: [PACKAGES]}
train: {steps: 400, global_batch_size: 4, micro_batch_size: 2, checkpoint_interval: 0, eval_interval: 2}
lifecycle: {heartbeat_interval_s: 0.5}
launcher: {num_processes: 2}
"""


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[str], tuple[RunDir, Path]]:
    def make(place: str) -> tuple[RunDir, Path]:
        packages, configs, marker = tmp_path / "packages", tmp_path / "configs", tmp_path / "marker"
        for folder in (
            packages / "waits",
            *(configs / group for group in ("experiment", "model", "data", "objective")),
        ):
            folder.mkdir(parents=True)
        (packages / "waits/__init__.py").write_text(PACKAGE)
        (configs / "experiment/waits.yaml").write_text(EXPERIMENT.replace("PACKAGES", str(packages)).lstrip())
        (configs / "model/m.yaml").write_text("_target_: waits.Net\n")
        (configs / "data/d.yaml").write_text(f"_target_: waits.sources\nplace: {place}\nmarker: {marker}\n")
        (configs / "objective/o.yaml").write_text("_target_: waits.Squares\n")
        tree, _ = load_run_config(["experiment=waits"], str(configs))
        tree = frozen_for_new_run(tree)
        check(tree)
        return RunDir.create(tree, path=tmp_path / "run"), marker

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[bytes]]]]:
    started: list[subprocess.Popen[bytes]] = []

    def call(run: RunDir, ranks: range, size: int) -> list[subprocess.Popen[bytes]]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        for rank in ranks:
            environment = os.environ | {
                "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
                "SLURM_NNODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PRETRAIN_ATTEMPT": "1",
                "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            log = run.rank_log_path(1, rank)
            log.parent.mkdir(parents=True, exist_ok=True)
            program = [sys.executable, "-m", "pretrain.training.entry", str(run.path)]
            with open(log, "wb") as stream:
                started.append(
                    subprocess.Popen(program, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
                )
        return started

    yield call
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], Any], processes: list[subprocess.Popen[bytes]], run: RunDir) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        ended = [process.poll() for process in processes]
        logs = "".join(path.read_text() for path in run.attempt_path(1).glob("rank_*.log"))
        assert ended == [None] * len(ended), logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


def ended_with(processes: list[subprocess.Popen[bytes]], run: RunDir) -> list[int]:
    try:
        return [process.wait(timeout=60) for process in processes]
    except subprocess.TimeoutExpired:
        logs = "".join(path.read_text() for path in run.attempt_path(1).glob("rank_*.log"))
        raise AssertionError(f"a rank did not answer the stop request\n{logs}") from None


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "phases", "saved"),
    [
        pytest.param("opening", {"start"}, False, id="opening data"),
        pytest.param("training", {"data", "all-reduce"}, True, id="training data"),
        pytest.param("validation", {"eval"}, True, id="validation data"),
    ],
)
def test_one_rank_that_waits_for_ever_does_not_keep_the_others_from_saving(
    make_run: Callable[[str], tuple[RunDir, Path]],
    start: Callable[..., list[subprocess.Popen[bytes]]],
    place: str,
    phases: set[str],
    saved: bool,
) -> None:
    run, marker = make_run(place)
    processes = start(run, range(2), 2)
    until(marker.exists, processes, run)
    # The other rank is on its way to where it needs this one.
    until(lambda: {beat.phase for beat in read_heartbeats(run, 1)} == phases, processes, run)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert ended_with(processes, run) == [ExitCode.RESUMABLE] * 2
    beats = read_heartbeats(run, 1)
    assert [beat.phase for beat in beats] == ["stop", "stop"]
    folder = CheckpointStore(run.checkpoints_path).select(None)
    if saved:
        assert [beat.step for beat in beats] == [beats[0].steps] * 2
        assert folder is not None
        assert folder.name == f"step_{beats[0].steps:08d}"
    else:
        assert folder is None


@pytest.mark.slow
def test_a_rank_whose_peers_never_come_leaves_when_asked(
    make_run: Callable[[str], tuple[RunDir, Path]], start: Callable[..., list[subprocess.Popen[bytes]]]
) -> None:
    run, _ = make_run("nowhere")
    processes = start(run, range(1), 2)
    until(lambda: any(b.detail == "joining the other ranks" for b in read_heartbeats(run, 1)), processes, run)
    processes[0].send_signal(signal.SIGUSR2)
    assert ended_with(processes, run) == [ExitCode.RESUMABLE]
    assert "SIGUSR2 during start-up" in run.rank_log_path(1, 0).read_text()


class _Stalls:
    fingerprint = "stalls"
    num_samples = None
    num_bytes = None

    def __init__(self) -> None:
        self.free = threading.Event()

    def batch(self, indices: Any) -> dict[str, np.ndarray]:
        if max(indices) >= 4:
            self.free.wait()
        return {"tokens": np.zeros((len(indices), 2), dtype=np.int64)}

    def close(self) -> None:
        pass


def test_a_loader_gives_up_its_wait_and_closes_without_its_thread() -> None:
    source, stop = _Stalls(), StopRequest((signal.SIGUSR1,))
    loader = StepLoader(source, 4, 2, 0, 1, while_waiting=stop.check)  # type: ignore[arg-type]
    assert len(next(loader)) == 2
    threading.Timer(0.3, stop.note, [signal.SIGUSR1]).start()
    with pytest.raises(StopRequestedError, match="SIGUSR1"):
        next(loader)
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)
    source.free.set()


def test_what_is_waited_for_gives_its_result_or_its_error() -> None:
    stop = StopRequest((signal.SIGUSR1,))
    assert stop.while_waiting(lambda: 7) == 7
    with pytest.raises(queue.Empty):
        stop.while_waiting(lambda: queue.Queue[int]().get_nowait())
    stop.note(signal.SIGUSR2)
    assert not stop.requested, "not one of its signals"
    stop.note(signal.SIGUSR1)
    with pytest.raises(StopRequestedError):
        stop.while_waiting(lambda: 7)
