"""A whole run by the command on a real server: its numbers, those of its node and its data, and how it ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import pretrain

from pretrain.tracking.metrics_log import read_records
from pretrain.tracking.store import import_client

pytestmark = pytest.mark.slow


def test_a_run_and_all_that_belongs_to_it_is_in_mlflow(server_port: int, tmp_path: Path) -> None:
    uri, path = f"http://127.0.0.1:{server_port}", tmp_path / "run"
    done = pretrain(
        "run", "--run-dir", path, "experiment=induction", "tracking=mlflow", f"tracking.uri={uri}",
        "tracking.experiment=whole", "tracking.flush_interval_s=0.5", "tracking.system_metrics_interval_s=0.5",
        "train.steps=10", "train.global_batch_size=4", "train.micro_batch_size=4", "train.log_interval=5",
        "train.eval_interval=0", "train.checkpoint_interval=5", "optimizer.schedule.warmup_steps=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    client = import_client(uri)
    run = client.get_run(json.loads((path / "mlflow.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert (run.data.tags["exit_class"], run.data.tags["restarts"]) == ("finished", "0")
    train = [record for record in read_records(path / "metrics.jsonl") if record["event"] == "train"]
    for name in ("loss", "data_wait_share", "data_ready_steps"):
        history = client.get_metric_history(run.info.run_id, f"train/{name}")
        assert [(metric.step, metric.value) for metric in history] == [(r["step"], r["metrics"][name]) for r in train]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "checkpoint/seconds")] == [5, 10]
    (samples,) = path.glob("system/attempt_0001/node_*.jsonl")
    history = client.get_metric_history(run.info.run_id, "system/node_00000/system_memory_usage_percentage")
    assert len(history) == len(samples.read_text().splitlines()) > 0
