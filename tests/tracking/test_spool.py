"""What of a run directory is sent, how far, and what is remembered of it. No MLflow involved."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.tracking.convert import fitting_name, metric_values
from pretrain.tracking.lifecycle import Value
from pretrain.tracking.lock import BusyError, sender_lock
from pretrain.tracking.metrics_log import MetricsLog
from pretrain.tracking.spool import Spool

URI = "http://server"


def _train(path: Path, first: int, last: int) -> None:
    with MetricsLog(path / "metrics.jsonl", 1) as log:
        for step in range(first, last):
            log.write("train", step, metrics={"loss": float(step)})


def _sample(path: Path, attempt: int, node: int, *times: float) -> None:
    file = path / "system" / f"attempt_{attempt:04d}" / f"node_{node:05d}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as stream:
        for when in times:
            stream.write(json.dumps({"time": when, "event": "system", "metrics": {"cpu": when}}) + "\n")


def _send_all(spool: Spool, limit_bytes: int = 1 << 17) -> list[Value]:
    values: list[Value] = []
    while True:
        parcel = spool.read(spool.journal(), limit_bytes)
        values += parcel.values
        spool.arrived(parcel)
        if parcel.is_last:
            return values


def test_every_record_comes_once_and_in_order_whatever_the_size_of_parcels(tmp_path: Path) -> None:
    _train(tmp_path, 0, 50)
    origin = Spool(tmp_path, URI).origin()
    assert origin is not None
    for node in range(3):
        _sample(tmp_path, 1, node, origin + 1, origin + 2)
    whole = _send_all(Spool(tmp_path, URI))
    assert [value.step for value in whole if value.name == "train/loss"] == list(range(50))
    assert [value.step for value in whole if value.name == "system/node_00002/cpu"] == [1, 2]
    assert len(whole) == 56
    for limit in (1, 100, 333):
        spool = Spool(tmp_path, URI)
        assert sorted(_send_all(spool, limit)) == sorted(whole)
        assert _send_all(spool, limit) == []


def test_what_has_arrived_is_remembered_for_each_store(tmp_path: Path) -> None:
    _train(tmp_path, 0, 3)
    spool = Spool(tmp_path, URI)
    assert len(_send_all(spool)) == 3
    spool.state["run_id"] = "a"
    spool.save()
    key = spool.state["key"]
    other = Spool(tmp_path, "http://me:secret@other")
    assert other.state["run_id"] is None
    assert other.state["key"] == key
    assert len(_send_all(other)) == 3
    other.state["run_id"] = "b"
    other.save()
    assert "secret" not in (tmp_path / "mlflow.json").read_text()
    _train(tmp_path, 3, 5)
    again = Spool(tmp_path, URI)
    assert again.state["run_id"] == "a"
    assert [value.step for value in _send_all(again)] == [3, 4]
    assert Spool(tmp_path, "http://***@other").state["run_id"] == "b"


def test_a_note_of_an_earlier_version_is_understood(tmp_path: Path) -> None:
    _train(tmp_path, 0, 3)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    _train(tmp_path, 3, 4)
    note = {"uri": URI, "run_id": "a", "experiment_id": "1", "offset": size, "key": "k", "run_name": "r"}
    (tmp_path / "mlflow.json").write_text(json.dumps(note))
    spool = Spool(tmp_path, URI)
    assert spool.state["run_id"] == "a"
    assert [value.step for value in _send_all(spool)] == [3]


def test_a_line_longer_than_a_parcel_and_a_torn_one_hold_up_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.write("health", 1, kind="spike", loss=9.0, text="x" * 5000)
        log.write("train", 2, metrics={"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"event": "train", "step": 3, "met')  # as SIGKILL leaves it
    spool = Spool(tmp_path, URI)
    names = [value.name for value in _send_all(spool, 100)]
    assert names == ["health/loss", "health/spike", "train/loss"]
    spool.state["run_id"] = "a"
    assert spool.is_delivered()
    _train(tmp_path, 4, 5)
    assert not spool.is_delivered()
    assert [value.step for value in _send_all(spool)] == [4]


def test_attempts_that_are_over_and_sent_are_not_looked_at_again(tmp_path: Path) -> None:
    _train(tmp_path, 0, 1)
    for attempt in (1, 2, 3):
        _sample(tmp_path, attempt, 0, 10.0 * attempt)
    spool = Spool(tmp_path, URI)
    assert len(_send_all(spool)) == 4
    assert spool.state["system_attempt"] == 3
    assert list(spool.state["files"]) == ["metrics.jsonl", "system/attempt_0003/node_00000.jsonl"]
    spool.forget()
    assert len(_send_all(spool)) == 4


def test_samples_of_nodes_wait_for_the_run_s_first_record(tmp_path: Path) -> None:
    _sample(tmp_path, 1, 1, 5.0)
    spool = Spool(tmp_path, URI)
    assert _send_all(spool) == []
    _train(tmp_path, 0, 1)
    assert [value.name for value in _send_all(spool)] == ["train/loss", "system/node_00001/cpu"]


def test_events_with_numbers_beside_metrics_become_values(tmp_path: Path) -> None:
    def names(**record: Any) -> dict[str, float]:
        return {value.name: value.value for value in metric_values({"time": 1.0, "step": 4, **record})}

    saved = names(event="checkpoint", path="p", seconds=2.5, stall_s=0.1, write_s=2.0, bytes=7)
    assert saved == {
        "checkpoint/seconds": 2.5,
        "checkpoint/stall_s": 0.1,
        "checkpoint/write_s": 2,
        "checkpoint/bytes": 7,
    }
    bad = names(event="health", kind="nonfinite", action="skip", loss="NaN", grad_norm="Infinity", sample_ids=[1, 2])
    assert bad["health/nonfinite"] == 1.0
    assert bad["health/loss"] != bad["health/loss"]
    assert bad["health/grad_norm"] == float("inf")
    assert names(event="fetched", counters={"bytes": 10, "hits": 2}) == {"fetched/bytes": 10.0, "fetched/hits": 2.0}
    assert names(event="phase", name="validation") == {}
    assert fitting_name("loss [nats]") == "loss _nats_"


def test_one_sender_at_a_time_and_a_dead_one_frees_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from pretrain.tracking.lock import sender_lock\n"
        "with sender_lock(Path(sys.argv[1])):\n print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="another process is sending"), sender_lock(lock):
            pass
        holder.kill()
        with sender_lock(lock, timeout_s=60.0):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_a_record_cut_short_by_a_full_disk_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    real, room = os.write, [30]

    def write(descriptor: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, data[: room[0]])
        room[0] -= written
        return written

    with MetricsLog(path, 1) as log:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(OSError, match="No space"):
                log.write("train", 1, metrics={"loss": 1.0})
        log.write("train", 2, metrics={"loss": 2.0})
    assert [value.step for value in _send_all(Spool(tmp_path, URI))] == [2]
