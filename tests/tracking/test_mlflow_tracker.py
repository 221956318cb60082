"""Tracking against a real MLflow SQLite store, against a server that is not there, and replay after the outage."""

from __future__ import annotations

import json
import logging
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.schema import TrackingConfig
from pretrain.tracking.metrics_log import MetricsLog, read_records
from pretrain.tracking.mlflow_tracker import MlflowTracker
from pretrain.tracking.store import embedded_uri, import_client, resolve_uri
from pretrain.tracking.sync import is_delivered, sync
from pretrain.tracking.uploader import ArtifactsError

WriteRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def client(store: Path) -> Any:
    return import_client(embedded_uri(store))


@pytest.fixture
def dead_uri() -> str:
    """Address of a server that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def _track(path: Path, config: TrackingConfig, **arguments: Any) -> MlflowTracker:
    return MlflowTracker(path, config, attempt=1, run_name=path.name, **arguments)


def _end(path: Path, status: str = "finished", attempt: int = 1) -> None:
    with MetricsLog(path / "metrics.jsonl", attempt) as log:
        log.write("end", 5, status=status)


def _state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "mlflow.json").read_text())
    return state


def _history(client: Any, run_id: str, name: str) -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, name)]


def _spool(path: Path, event: str, name: str) -> list[tuple[int, int, float]]:
    return [
        (record["step"], int(record["time"] * 1000), record["metrics"][name])
        for record in read_records(path / "metrics.jsonl")
        if record["event"] == event
    ]


def test_a_whole_run_arrives(client: Any, store: Path, tmp_path: Path, write_run: WriteRun) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    path = write_run(tmp_path / "run", store=str(store))
    tracker = _track(
        path, TrackingConfig(store=str(store)), tags={"data_fingerprint": "f00d"}, artifacts=[str(tokenizer)]
    )
    _end(path)
    assert tracker.close("finished")
    run = client.get_run(_state(path)["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["train.steps"] == "5"
    for name, value in {
        "data_fingerprint": "f00d",
        "git.revision": "0123abc",
        "git.dirty": "true",
        "host": "node1",
        "version.torch": "2.9",
        "run_dir": str(path),
        "attempt": "1",
    }.items():
        assert run.data.tags[name] == value
    assert _history(client, run.info.run_id, "train/loss") == _spool(path, "train", "loss")
    assert _history(client, run.info.run_id, "eval/validation_loss") == _spool(path, "eval", "validation_loss")
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "git.diff", "samples.txt", "tokenizer.json", "environment.json"} <= names
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(store)


def test_a_dead_server_neither_raises_nor_loses(
    client: Any,
    store: Path,
    tmp_path: Path,
    write_run: WriteRun,
    dead_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    path = write_run(tmp_path / "run", store=str(store))
    with caplog.at_level(logging.WARNING):
        tracker = _track(path, TrackingConfig(uri=dead_uri, flush_interval_s=0.01), tags={"data_fingerprint": "f00d"})
        _end(path, "interrupted")
        assert not tracker.close("interrupted")
    complaints = [record.message for record in caplog.records if "cannot be written" in record.message]
    assert len(complaints) == 1
    assert f"pretrain tracking sync {path}" in caplog.text
    # The store is back (here: another one). Everything arrives, tags kept from the live run included, and only once.
    first = sync(path)
    second = sync(path)
    third = sync(path, everything=True)
    assert (first.num_metrics, second.num_metrics, third.num_metrics) == (12, 0, 12)
    assert first.run_id == second.run_id == third.run_id
    assert _history(client, first.run_id, "train/loss") == _spool(path, "train", "loss")
    run = client.get_run(first.run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["data_fingerprint"] == "f00d"


def test_a_resumed_and_extended_run_goes_on_under_its_id(
    client: Any, store: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    config = TrackingConfig(store=str(store))
    path = write_run(tmp_path / "run", store=str(store))
    _end(path, "interrupted")
    assert _track(path, config).close("interrupted")
    run_id = _state(path)["run_id"]
    tree = yaml.safe_load((path / "config.yaml").read_text())
    tree["train"]["steps"] = 7
    tree["train"]["note"] = "new"
    (path / "revisions").mkdir()
    (path / "revisions" / "0001.yaml").write_text(yaml.safe_dump(tree))
    with MetricsLog(path / "metrics.jsonl", 2) as log:
        log.write("start", 5, steps=7, world_size=2)
        log.write("train", 6, metrics={"loss": math.nan})
    resumed = _track(path, config)
    with MetricsLog(path / "metrics.jsonl", 2) as log:
        log.write("train", 7, metrics={"loss": math.inf})
    assert resumed.close(None)
    assert _state(path)["run_id"] == run_id
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"  # no end was recorded
    assert run.data.params["train.steps"] == "5"
    assert run.data.params["train.note"] == "new"
    assert run.data.tags["param.train.steps.rev1"] == "7"
    assert [step for step, _, _ in _history(client, run_id, "train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    _end(path, "failed", attempt=2)
    sync(path)
    assert client.get_run(run_id).info.status == "FAILED"


def test_an_end_that_could_not_be_recorded_still_reaches_mlflow(
    client: Any, store: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    path = write_run(tmp_path / "run", store=str(store))
    assert _track(path, TrackingConfig(store=str(store))).close("failed")
    assert client.get_run(_state(path)["run_id"]).info.status == "FAILED"


def test_an_ended_run_is_shown_as_ended_though_its_files_cannot_be_sent(
    client: Any,
    store: Path,
    tmp_path: Path,
    write_run: WriteRun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlflow.tracking import MlflowClient

    from pretrain.cli import main

    path = write_run(tmp_path / "run", store=str(store))
    tried: list[str] = []

    def unreachable(self: Any, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        tried.append(local_path)
        raise OSError(f"artifacts of {run_id} cannot be reached")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(MlflowClient, "log_artifact", unreachable)
        _end(path)
        tracker = _track(path, TrackingConfig(store=str(store), flush_interval_s=0.01))
        deadline = time.monotonic() + 120
        while tracker._failures < 2:
            assert time.monotonic() < deadline, "waited two minutes for two tries"
            time.sleep(0.02)
        assert not tracker.close("finished", timeout=0.5)
        tracker._thread.join(120)
        run_id = _state(path)["run_id"]
        assert client.get_run(run_id).info.status == "FINISHED"
        told = [record.message for record in caplog.records if "cannot be reached" in record.message]
        assert len(told) == 1
        assert not is_delivered(path)
        assert main(["tracking", "status", str(path)]) == 0
        assert "FINISHED\nmissing   5 files; send: pretrain tracking sync" in capsys.readouterr().out
        tried.clear()
        assert main(["tracking", "sync", str(path)]) == 1
        assert len(tried) == 3  # a place that takes none is not asked for each of a thousand
        assert "MLflow has all values, but ArtifactsError: 5 of the run's files" in capsys.readouterr().err

    def picky(self: Any, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        if local_path.endswith("git.diff"):
            raise OSError("too large")
        real(self, run_id, local_path, artifact_path)

    real = MlflowClient.log_artifact
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", picky)
        with pytest.raises(ArtifactsError, match="1 of the run's files could not be sent: OSError: too large"):
            sync(path)
    names = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert {"config.yaml", "git.json", "samples.txt"} <= names
    assert "git.diff" not in names
    sync(path)
    assert "git.diff" in {artifact.path for artifact in client.list_artifacts(run_id)}
    assert is_delivered(path)


@pytest.mark.parametrize("damage", ["", "[1, 2]", '{"key": 7, "files": null}', None])
def test_a_damaged_note_leads_to_the_same_run(
    client: Any, store: Path, tmp_path: Path, write_run: WriteRun, damage: str | None
) -> None:
    path = write_run(tmp_path / "run", store=str(store))
    run_id = sync(path).run_id
    if damage is None:
        (path / "mlflow.json").unlink()
    else:
        (path / "mlflow.json").write_text(damage)
    assert sync(path).run_id == run_id
    assert _history(client, run_id, "train/loss") == _spool(path, "train", "loss")


def test_a_creation_whose_answer_was_lost_is_found_again(
    client: Any, store: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    path = write_run(tmp_path / "run", store=str(store))
    run_id = sync(path).run_id
    state = _state(path)
    # As if the process died between the server's creation and our note of it.
    (path / "mlflow.json").write_text(json.dumps({**state, "run_id": None, "offset": 0}))
    assert sync(path).run_id == run_id
    assert _history(client, run_id, "train/loss") == _spool(path, "train", "loss")


def test_a_run_deleted_from_the_store_is_sent_anew(
    client: Any, store: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    path = write_run(tmp_path / "run", store=str(store))
    sync(path)
    (path / "mlflow.json").write_text(json.dumps({**_state(path), "run_id": "0" * 32, "key": "other"}))
    again = sync(path)
    assert again.num_metrics == 12
    assert _history(client, again.run_id, "train/loss") == _spool(path, "train", "loss")


def test_a_value_that_mlflow_refuses_does_not_hold_up_the_rest(
    client: Any, store: Path, tmp_path: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    path = write_run(tmp_path / "run", store=str(store))
    real = MlflowClient.log_batch

    def picky(self: Any, run_id: str, metrics: Any = (), **arguments: Any) -> Any:
        if any(metric.key == "train/loss" and metric.step == 3 for metric in metrics):
            raise MlflowException("odd value", error_code=1000)  # INVALID_PARAMETER_VALUE
        return real(self, run_id, metrics=metrics, **arguments)

    monkeypatch.setattr(MlflowClient, "log_batch", picky)
    run_id = sync(path).run_id
    assert [step for step, _, _ in _history(client, run_id, "train/loss")] == [1, 2, 4, 5]
    assert len(_history(client, run_id, "train/learning_rate")) == 5


def test_names_values_and_credentials_are_made_fit(
    client: Any, store: Path, tmp_path: Path, write_run: WriteRun
) -> None:
    secret = "https://me:hunter2@host"
    path = write_run(tmp_path / "run", store=str(store))
    tree = yaml.safe_load((path / "config.yaml").read_text())
    tree["model"] = {"pattern": "M" * 9000, "odd [name]": 1, "url": secret, "empty": {}, "betas": [0.9, 0.95]}
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    with MetricsLog(path / "metrics.jsonl", 1) as log:
        log.write("train", 6, metrics={"loss [nats]": 1.0})
    run = client.get_run(sync(path).run_id)
    assert run.data.params["model.url"] == "https://***@host"
    assert run.data.params["model.betas"] == "[0.9, 0.95]"
    assert run.data.params["model.odd _name_"] == "1"
    assert len(run.data.params["model.pattern"]) == 500
    assert "train/loss _nats_" in run.data.metrics


def test_the_store_is_chosen_by_config_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = TrackingConfig(store=str(tmp_path))
    assert resolve_uri(config) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert resolve_uri(config) == "http://server"
    assert resolve_uri(TrackingConfig(uri="http://mine")) == "http://mine"


def test_sync_of_something_else_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from pretrain.commands import tracking as verb

    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert verb.run(parser.parse_args(["sync", str(tmp_path)])) == 2
    assert "not a run directory" in capsys.readouterr().err
