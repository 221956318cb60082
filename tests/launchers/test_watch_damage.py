"""Whatever a crash, a full disk or another release leaves in a run directory, the run is listed and shown."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.watched_run import WatchedRun

from launchers.watch.details import read_details
from launchers.watch.jobs import Jobs, JobView
from launchers.watch.summary import summarise
from pretrain.cli import main


def rich_run(path: Path) -> WatchedRun:
    """A run with every kind of record that is read."""
    run = WatchedRun(path)
    run.submitted(7)
    run.started(1, 7)
    run.trained(1, 0, 10)
    run.ended(1, "preempted", "requeue")
    run.journal("requeued", job=7, exclude=[])
    run.started(2, 7)
    run.trained(2, 10, 20)
    run.journal("cancel_requested", now=False, by="me")
    run.held(2)
    run.beat(2, 0, collective={"name": "allreduce", "count": 3, "since": 1.0, "running": True})
    run.beat(2, 1)
    run.run.cancel_path.write_text('{"time": 1.0, "now": false}\n')
    run.run.mlflow_path.write_text('{"uri": "http://u:p@host", "run_id": "abc"}\n')
    with open(run.run.metrics_path, "a") as stream:
        stream.write('{"time": 1.0, "attempt": 2, "event": "health", "step": 20, "kind": "spike", "action": "skip"}\n')
        stream.write('{"time": 1.0, "attempt": 2, "event": "checkpoint", "step": 20, "seconds": 1.5, "bytes": 9}\n')
        stream.write('{"time": 1.0, "attempt": 2, "event": "eval", "step": 20, "metrics": {"validation_loss": 1.0}}\n')
        stream.write('{"time": 1.0, "attempt": 2, "event": "end", "step": 20, "status": "interrupted"}\n')
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> WatchedRun:
    return rich_run(tmp_path_factory.mktemp("runs") / "whole")


_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["NaN", "Infinity", "finished", "requeue", "\ud800", 10**400, -1, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def show_everything(path: Path) -> None:
    """Each way in which a run is shown; raises whatever any of them raises."""
    for jobs in (None, Jobs(asked=True), Jobs({"7": JobView("PENDING")}, asked=True)):
        summary = summarise(path, jobs, time.time())
        assert summary.name == path.name
        read_details(summary)
    # Encoded as a real stream does: not every str can be.
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO(), "utf-8")):
        for verb in (["runs", path], ["runs", path, "--json"], ["status", path], ["status", path, "--json", "--ranks"]):
            assert main([str(word) for word in verb]) == 0
    out.flush()
    assert path.name in out.buffer.getvalue().decode()  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_never_keep_a_run_from_being_shown(whole: WatchedRun, data: st.DataObject) -> None:
    files = sorted(path for path in whole.path.rglob("*") if path.is_file())
    damaged = data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True))
    before = {path: path.read_bytes() for path in damaged}
    try:
        for path in damaged:
            content = before[path]
            how = data.draw(st.sampled_from(["cut", "flip", "garbage", "remove", "folder", "fields"]))
            if how == "cut":
                path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
            elif how == "flip" and content:
                at = data.draw(st.integers(0, len(content) - 1))
                path.write_bytes(content[:at] + data.draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :])
            elif how == "garbage":
                path.write_bytes(data.draw(st.binary(max_size=200)))
            elif how == "remove" and path.name != "config.yaml":
                path.unlink()
            elif how == "folder" and path.name != "config.yaml":
                path.unlink()
                path.mkdir()
            elif how == "fields":
                path.write_bytes(_with_other_fields(content, data))
        show_everything(whole.path)
    finally:
        for path, content in before.items():
            if path.is_dir():
                path.rmdir()
            path.write_bytes(content)


def _with_other_fields(content: bytes, data: st.DataObject) -> bytes:
    """Valid JSON still, but some fields hold what they should not."""
    lines = []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            lines.append(line)
            continue
        if isinstance(record, dict) and record:
            for name in data.draw(st.lists(st.sampled_from(sorted(record)), max_size=3)):
                record[name] = data.draw(_values)
        lines.append(json.dumps(record).encode())
    return b"\n".join(lines) + b"\n"


def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = rich_run(tmp_path / "demo")
    run.run.lease_path.write_text("{")
    run.run.mlflow_path.write_text("[1]")
    (run.path / "config.yaml").write_text("a: [1\n")
    assert main(["status", str(run.path)]) == 0
    errors = capsys.readouterr().err
    for words in ("lease.json: damaged (no JSON)", "mlflow.json: damaged (no JSON object)", "config.yaml: damaged"):
        assert words in errors
    assert main(["runs", str(run.path)]) == 0
    assert "files that cannot be read in demo" in capsys.readouterr().err


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """As a user to whom permissions apply: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_files_without_permission_are_named() -> None:
    # Not tmp_path: no other user may enter that.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        run = rich_run(Path(folder) / "demo")
        assert summarise(run.path).faults == ()  # and all is imported that another user may not read
        run.run.lifecycle_path.chmod(0)
        with as_nobody():
            faults = summarise(run.path).faults
    assert [fault for fault in faults if "Permission denied" in fault] == list(faults)
    assert any("lifecycle.jsonl: Permission denied" in fault for fault in faults)


def test_a_torn_last_line_hides_nothing_before_it(tmp_path: Path) -> None:
    run = rich_run(tmp_path / "demo")
    expected = summarise(run.path)
    for path in (run.run.metrics_path, run.run.lifecycle_path):
        with open(path, "a") as stream:
            stream.write('{"time": 17, "event": "attempt_ended", "exit_cla')
    found = summarise(run.path)
    assert (found.state, found.step, found.attempts) == (expected.state, expected.step, expected.attempts)
