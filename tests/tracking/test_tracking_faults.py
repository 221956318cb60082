"""Live tracking against a real server that is down, late, killed or shared: everything arrives, in order, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command import pretrain
from support.mlflow_server import server
from support.records import write_steps
from support.tcp_proxy import TcpProxy, free_port

from pretrain.config.schema import TrackingConfig
from pretrain.tracking.metrics_log import MetricsLog, read_records
from pretrain.tracking.mlflow_tracker import MlflowTracker
from pretrain.tracking.store import import_client
from pretrain.tracking.sync import sync

pytestmark = pytest.mark.slow

WriteRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def proxy(server_port: int) -> Iterator[TcpProxy]:
    with TcpProxy(server_port) as made:
        yield made


def _wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"waited two minutes for: {what}"
        time.sleep(0.02)


def _track(path: Path, uri: str, **settings: Any) -> MlflowTracker:
    config = TrackingConfig(**{"uri": uri, "experiment": path.name, "flush_interval_s": 0.05, **settings})
    return MlflowTracker(path, config, attempt=1, run_name=path.name)


def _end(path: Path, step: int, status: str = "finished", attempt: int = 1) -> None:
    with MetricsLog(path / "metrics.jsonl", attempt) as log:
        log.write("end", step, status=status)


def _steps(path: Path, first: int, last: int) -> None:
    with MetricsLog(path / "metrics.jsonl", 1) as log:
        for step in range(first + 1, last + 1):
            log.write("train", step, metrics={"loss": 5.0 / step, "learning_rate": 1e-3})


def _run_id(path: Path) -> str:
    run_id: str = json.loads((path / "mlflow.json").read_text())["run_id"]
    return run_id


def assert_arrived(uri: str, path: Path, num_runs: int = 1) -> Any:
    """The server has each recorded value once, in the order written, in the only run of the experiment."""
    client = import_client(uri)
    experiment = client.get_experiment_by_name(path.name)
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == num_runs
    run = client.get_run(_run_id(path))
    spooled: dict[str, list[tuple[int, int, float]]] = {}
    for record in read_records(path / "metrics.jsonl"):
        for name, value in record.get("metrics", {}).items():
            spooled.setdefault(f"{record['event']}/{name}", []).append(
                (record["step"], int(record["time"] * 1000), value)
            )
    assert spooled
    for name, expected in spooled.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.timestamp, metric.value) for metric in history] == expected, name
    return run


def test_a_server_that_is_down_at_the_start_gets_everything_when_it_comes(
    proxy: TcpProxy, tmp_path: Path, write_run: WriteRun
) -> None:
    path = write_run(tmp_path / "late_server")
    tracker = _track(path, proxy.uri)
    _wait_for(lambda: tracker._failures >= 2, "two tries at a server that is not there")
    _steps(path, 5, 40)
    proxy.listen()
    _end(path, 40)
    assert tracker.close("finished", timeout=120)
    assert assert_arrived(proxy.uri, path).info.status == "FINISHED"


def test_training_writes_on_while_the_server_does_not_answer(
    proxy: TcpProxy, tmp_path: Path, write_run: WriteRun
) -> None:
    proxy.hold_answer = lambda request: True
    proxy.listen()
    path = write_run(tmp_path / "slow_server")
    tracker = _track(path, proxy.uri)
    assert proxy.held.wait(120)
    # One request is under way and unanswered. All of training happens meanwhile.
    _steps(path, 5, 300)
    _end(path, 300)
    assert len(proxy.requests) == 1
    assert not tracker.close("finished", timeout=0.1)
    proxy.release()
    tracker._thread.join(120)  # a rank would be gone by now; here the thread may live on
    if not tracker._complete:
        sync(path, proxy.uri)
    assert assert_arrived(proxy.uri, path).info.status == "FINISHED"


def test_a_creation_that_is_carried_out_too_late_leaves_one_run(
    proxy: TcpProxy, tmp_path: Path, write_run: WriteRun
) -> None:
    creations = []

    def first_creation(request: bytes) -> bool:
        if b"/runs/create" in request:
            creations.append(request)
        return len(creations) == 1 and b"/runs/create" in request

    proxy.hold_request = first_creation
    proxy.listen()
    path = write_run(tmp_path / "late_creation")
    tracker = _track(path, proxy.uri, request_timeout_s=2.0)
    _wait_for(lambda: tracker._uploader is not None and tracker._uploader.run_id, "a second creation")
    assert len(creations) == 2
    # Only now the server hears of the first one.
    experiment = import_client(f"http://127.0.0.1:{proxy.target}").get_experiment_by_name(path.name).experiment_id
    proxy.release()
    _wait_for(
        lambda: len(import_client(f"http://127.0.0.1:{proxy.target}").search_runs([experiment])) == 2, "the late run"
    )
    _end(path, 5)
    assert tracker.close("finished", timeout=120)
    assert_arrived(proxy.uri, path)


def test_an_answer_that_is_lost_half_way_leaves_each_value_once(
    proxy: TcpProxy, tmp_path: Path, write_run: WriteRun
) -> None:
    proxy.hold_answer = lambda request: b"/runs/log-batch" in request and not proxy.held.is_set()
    proxy.listen()
    path = write_run(tmp_path / "lost_answer")
    tracker = _track(path, proxy.uri, request_timeout_s=2.0)
    _wait_for(lambda: tracker._failures, "an answer that is given up")
    _steps(path, 5, 20)
    _end(path, 20)
    assert tracker.close("finished", timeout=120)
    assert_arrived(proxy.uri, path)


def test_a_server_killed_and_restarted_during_a_run(tmp_path: Path, write_run: WriteRun) -> None:
    store, port = tmp_path / "server", free_port()
    store.mkdir()
    path = write_run(tmp_path / "killed_server")
    with server(store, port) as uri:
        tracker = _track(path, uri)
        _wait_for(lambda: tracker._uploader and tracker._uploader.run_id, "the run at the server")
        _steps(path, 5, 50)
    # Killed by SIGKILL, whatever it was doing.
    _steps(path, 50, 100)
    _wait_for(lambda: tracker._failures, "a try at the dead server")
    with server(store, port) as uri:
        _steps(path, 100, 150)
        _end(path, 150)
        assert tracker.close("finished", timeout=120)
        assert assert_arrived(uri, path).info.status == "FINISHED"


def test_two_runs_at_once_on_one_server(proxy: TcpProxy, tmp_path: Path, write_run: WriteRun) -> None:
    proxy.listen()
    paths = [write_run(tmp_path / name / "shared") for name in ("one", "two")]  # one experiment, made by either
    trackers = [_track(path, proxy.uri) for path in paths]
    writers = [threading.Thread(target=_steps, args=(path, 5, 200)) for path in paths]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    for path, tracker in zip(paths, trackers, strict=True):
        _end(path, 200)
        assert tracker.close("finished", timeout=120)
    assert _run_id(paths[0]) != _run_id(paths[1])
    for path in paths:
        assert assert_arrived(proxy.uri, path, num_runs=2).info.status == "FINISHED"


def test_a_sync_during_training_and_training_do_not_disturb_each_other(
    proxy: TcpProxy, tmp_path: Path, write_run: WriteRun
) -> None:
    proxy.listen()
    path = write_run(tmp_path / "synced", uri=proxy.uri, experiment="synced")
    tracker = _track(path, proxy.uri)
    for last in (50, 100, 150):
        _steps(path, last - 50 if last > 50 else 5, last)
        sync(path)
    _end(path, 150)
    assert tracker.close("finished", timeout=120)
    assert_arrived(proxy.uri, path)


_RANK = """
import sys
from pathlib import Path
from pretrain.config.schema import TrackingConfig
from pretrain.tracking.mlflow_tracker import MlflowTracker
tracker = MlflowTracker(Path(sys.argv[1]), TrackingConfig(uri=sys.argv[2]), attempt=1, run_name="rank")
print("started", flush=True)
sys.stdin.readline()
print(tracker.close("finished", timeout=0.2), flush=True)
"""


def test_a_rank_ends_though_the_server_never_answers(proxy: TcpProxy, tmp_path: Path, write_run: WriteRun) -> None:
    proxy.hold_answer = lambda request: True
    proxy.listen()
    path = write_run(tmp_path / "hanging_server")
    rank = subprocess.Popen(
        [sys.executable, "-c", _RANK, str(path), proxy.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert proxy.held.wait(120)
        answers = rank.communicate("end\n", timeout=60)[0]  # far less than the 60 s and more that a request may take
        assert answers.split() == ["started", "False"]
        assert rank.returncode == 0
    finally:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


def test_a_run_ends_normally_at_a_server_that_takes_30_s_for_each_answer(server_port: int, tmp_path: Path) -> None:
    path = tmp_path / "slow_answers"
    with TcpProxy(server_port, delay_s=30) as proxy:
        proxy.listen()
        done = pretrain(
            "run", "--run-dir", path, "experiment=induction", "tracking=mlflow", f"tracking.uri={proxy.uri}",
            f"tracking.experiment={path.name}", "tracking.flush_interval_s=0.05", "tracking.close_timeout_s=0.5",
            "tracking.system_metrics_interval_s=0", "train.steps=10", "train.global_batch_size=4",
            "train.micro_batch_size=4", "train.log_interval=1", "train.eval_interval=5", "train.eval_samples=4",
            "train.final_eval=false", "optimizer.schedule.warmup_steps=2",
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert read_records(path / "metrics.jsonl")[-1]["status"] == "finished"
        assert f"pretrain tracking sync {path}" in said
        # Asked, and not waited for: the run would be known there after its fourth answer.
        assert proxy.requests
        assert json.loads((path / "mlflow.json").read_text())["run_id"] is None
        proxy.delay_s = 0.0
        done = pretrain("tracking", "sync", path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert assert_arrived(proxy.uri, path).info.status == "FINISHED"


def test_a_run_queued_again_is_scheduled_and_keeps_its_id(proxy: TcpProxy, tmp_path: Path, write_run: WriteRun) -> None:
    proxy.listen()
    path = write_run(tmp_path / "requeued", uri=proxy.uri, experiment="requeued")
    client = import_client(proxy.uri)

    def journal(event: str, **fields: Any) -> None:
        with open(path / "lifecycle.jsonl", "a") as stream:
            stream.write(json.dumps({"time": time.time(), "event": event, **fields}) + "\n")

    def told() -> tuple[str, dict[str, str]]:
        run_id = sync(path).run_id
        run = client.get_run(run_id)
        assert run_id == _run_id(path)
        return run.info.status, run.data.tags

    journal("submitted", job="17", kind="first", script="x", exclude=[])
    status, tags = told()
    assert (status, tags["slurm.job"]) == ("SCHEDULED", "17")
    first = _run_id(path)
    journal("attempt_started", attempt=1, launcher="slurm", job="17", nodes=["n1", "n2"], num_processes=2)
    assert told()[0] == "RUNNING"
    _end(path, 5, "interrupted")
    assert told()[0] == "RUNNING"  # what follows is not rank 0's to know
    ended = {"attempt": 1, "first_step": 0, "last_step": 5, "saved_step": 4, "reason": "preempted by job 18"}
    journal("attempt_ended", exit_class="preempted", action="requeue", **ended)
    status, tags = told()
    assert (status, tags["exit_class"], tags["exit_reason"]) == ("SCHEDULED", "preempted", "preempted by job 18")
    journal("requeued", job="17", exclude=[])
    journal("attempt_started", attempt=2, launcher="slurm", job="17", nodes=["n3"], num_processes=1)
    status, tags = told()
    assert (status, tags["restarts"], tags["nodes"]) == ("RUNNING", "1", "n3")
    write_steps(path, 2, 4, 6)
    _end(path, 6, "finished", attempt=2)
    status, tags = told()
    assert (status, tags["exit_class"]) == ("FINISHED", "finished")
    assert _run_id(path) == first
    lost = client.get_metric_history(first, "lifecycle/steps_lost")
    assert [(metric.step, metric.value) for metric in lost] == [(4, 1.0)]
    names = {artifact.path for artifact in client.list_artifacts(first)}
    assert "lifecycle.jsonl" in names
