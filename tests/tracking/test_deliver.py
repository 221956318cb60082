"""Telling MLflow from outside the ranks: at submission, after an attempt, by hand; bounded, and never raising."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tcp_proxy import free_port

from pretrain.commands import tracking as verb
from pretrain.tracking import sync as sync_module
from pretrain.tracking.store import embedded_uri, import_client
from pretrain.tracking.sync import deliver, is_delivered, sync, tracking_link

WriteRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _no_process(*_arguments: Any, **_settings: Any) -> Any:
    raise AssertionError("nothing is to be sent")


def _run_verb(*words: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(words))


def _submitted_run(path: Path, **tracking: Any) -> Path:
    """As it is on the login node when the job has been queued: no rank has written anything."""
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({"run": {"name": "r"}, "tracking": tracking}))
    event = {"time": 1.7e9, "event": "submitted", "job": "4711", "kind": "first", "script": "s", "exclude": []}
    (path / "lifecycle.jsonl").write_text(json.dumps(event) + "\n")
    return path


def test_a_queued_run_is_in_mlflow_before_it_starts_and_trains_under_the_same_id(
    store: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    path = _submitted_run(tmp_path / "run", store=str(store))
    assert deliver(path, timeout_s=120.0)
    run_id = json.loads((path / "mlflow.json").read_text())["run_id"]
    run = import_client(embedded_uri(store)).get_run(run_id)
    assert run.info.status == "SCHEDULED"
    assert run.data.tags["slurm.job"] == "4711"
    assert tracking_link(path) == f"pretrain ui --store {store}"
    with open(path / "lifecycle.jsonl", "a") as stream:
        started = {"attempt": 1, "launcher": "slurm", "job": "4711", "nodes": ["n1"], "num_processes": 1}
        stream.write(json.dumps({"time": 1.7e9 + 60, "event": "attempt_started", **started}) + "\n")
    assert not is_delivered(path)
    assert sync(path).run_id == run_id
    assert import_client(embedded_uri(store)).get_run(run_id).info.status == "RUNNING"


def test_nothing_is_started_where_nothing_is_to_be_told(
    store: Path, tmp_path: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered = write_run(tmp_path / "delivered", store=str(store))
    sync(delivered)
    disabled = _submitted_run(tmp_path / "disabled", enabled=False)
    monkeypatch.setattr(subprocess, "run", _no_process)
    assert deliver(delivered)
    assert deliver(disabled)
    assert tracking_link(disabled) is None


def test_a_dead_server_or_a_broken_run_directory_is_an_answer_and_no_error(tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    path = _submitted_run(tmp_path / "run", uri=dead)
    assert not deliver(path, timeout_s=120.0)
    assert not is_delivered(path)
    assert tracking_link(path) == dead
    assert not deliver(tmp_path / "nothing")


def test_a_sender_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _submitted_run(tmp_path / "run", uri="http://127.0.0.1:1")
    real = subprocess.run

    def run(command: list[str], **settings: Any) -> Any:
        return real(["sleep", "600"], **settings)  # like a server that does not answer

    monkeypatch.setattr(sync_module.subprocess, "run", run)
    assert not deliver(path, timeout_s=0.1)


def test_status_says_what_is_missing_and_how_to_send_it(
    store: Path, tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run", store=str(store))
    size = (path / "metrics.jsonl").stat().st_size
    assert _run_verb("status", str(path)) == 0
    told = capsys.readouterr().out
    assert "not there yet" in told
    assert f"{size:,} bytes" in told
    assert f"pretrain tracking sync {path}" in told
    assert _run_verb("sync", str(path)) == 0
    assert "sent 12 metric values" in capsys.readouterr().out
    assert _run_verb("status", str(path)) == 0
    told = capsys.readouterr().out
    assert "missing   nothing" in told
    assert "RUNNING" in told


def test_a_server_that_cannot_be_reached_is_one_line(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run", uri=f"http://127.0.0.1:{free_port()}")
    assert _run_verb("sync", str(path)) == 1
    error = capsys.readouterr().err
    assert "did not take it" in error
    assert "Nothing is lost" in error
    assert "Try again later" in error
    assert len(error.splitlines()) == 2


def test_a_refusal_that_will_not_pass_is_not_to_be_tried_again(
    tmp_path: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    def refuse(*_arguments: Any, **_settings: Any) -> Any:
        raise MlflowException("Permission denied", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(sync_module, "sync", refuse)
    path = write_run(tmp_path / "runs" / "demo-1")
    assert _run_verb("sync", "demo", "--root", str(tmp_path / "runs")) == 1
    error = capsys.readouterr().err
    assert f"Nothing is lost: {path} keeps it" in error
    assert "Trying again alone does not help" in error


def test_a_status_that_has_not_arrived_is_missing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _submitted_run(tmp_path / "run", store=str(store))
    sync(path)
    assert is_delivered(path)
    state = json.loads((path / "mlflow.json").read_text())
    # All records had been noted as arrived when the sender died, and the status had not.
    with open(path / "lifecycle.jsonl", "a") as stream:
        stream.write(json.dumps({"time": 1.7e9 + 9, "event": "cancelled", "job": "4711"}) + "\n")
    (path / "mlflow.json").write_text(json.dumps({**state, "num_journal": 2}))
    assert not is_delivered(path)
    assert _run_verb("status", str(path)) == 0
    assert "missing   the status KILLED; send" in capsys.readouterr().out
    sync(path)
    assert import_client(embedded_uri(store)).get_run(state["run_id"]).info.status == "KILLED"
    assert is_delivered(path)
