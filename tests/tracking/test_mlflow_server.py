"""A real MLflow server over HTTP: a run arrives, survives an outage of the server, and nothing arrives twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.mlflow_server import server
from support.records import write_steps
from support.tcp_proxy import free_port

from pretrain.config.schema import TrackingConfig
from pretrain.tracking.mlflow_tracker import MlflowTracker
from pretrain.tracking.store import import_client
from pretrain.tracking.sync import sync

pytestmark = pytest.mark.slow


def test_a_run_reaches_a_server_and_survives_its_outage(
    tmp_path: Path, write_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, port = tmp_path / "server", free_port()
    store.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    run_path = write_run(tmp_path / "run", num_steps=4)
    with server(store, port) as uri:
        tracker = MlflowTracker(run_path, TrackingConfig(), attempt=1, run_name="run")
        assert tracker.close("interrupted")
        run_id = import_client(uri).search_runs(["1"])[0].info.run_id
    # The server is gone while the run goes on: training is not disturbed, the record grows.
    tracker = MlflowTracker(run_path, TrackingConfig(flush_interval_s=0.1), attempt=2, run_name="run")
    write_steps(run_path, 2, 4, 7)
    assert not tracker.close("finished")
    with server(store, port) as uri:
        assert sync(run_path).run_id == run_id
        assert sync(run_path, everything=True).run_id == run_id
        client = import_client(uri)
        history = client.get_metric_history(run_id, "train/loss")
        assert sorted(metric.step for metric in history) == [1, 2, 3, 4, 5, 6, 7]
        assert {artifact.path for artifact in client.list_artifacts(run_id)} >= {"config.yaml", "samples.txt"}
        assert len(client.search_runs(["1"])) == 1
