"""A disk that fills up: one message, the decision on record, nothing half made."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from launchers.lease import Lease, LeaseHeldError
from launchers.lifecycle import evidence, journal
from launchers.lifecycle.supervise import Supervisor
from launchers.local import LocalBackend
from launchers.run_dir import RunDir, RunDirectoryError
from launchers.slurm import job
from launchers.watch.summary import summarise
from pretrain.config import files
from pretrain.config.launch_schema import LifecycleConfig, LocalConfig, SlurmConfig
from pretrain.config.schema import Config
from pretrain.tracking.metrics_log import MetricsLog
from pretrain.training.failure import guarded


def full(path: Path, *_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def full_until(room_is_made: Callable[[], bool], write: Callable[..., Any]) -> Callable[..., Any]:
    def attempt_to_write(path: Any, *arguments: Any, **fields: Any) -> Any:
        return write(path, *arguments, **fields) if room_is_made() else full(path)

    return attempt_to_write


def test_run_directory_that_does_not_fit_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_write_temporary", full)
    with pytest.raises(RunDirectoryError, match=r"config\.yaml: cannot be written \(No space left.*make room"):
        RunDir.create({"a": 1}, root=tmp_path, name="demo")
    with pytest.raises(RunDirectoryError, match="No space left"):
        RunDir.create({"a": 1}, path=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_do_not_fit_undo_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def no_checkpoints(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "checkpoints":
            full(path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", no_checkpoints)
    with pytest.raises(RunDirectoryError, match="make room"):
        RunDir.create({"a": 1}, path=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_revision_that_does_not_fit_is_refused(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_write_temporary", full)
    with pytest.raises(RunDirectoryError, match=r"0001\.yaml: cannot be written"):
        run.add_revision(run.config(), [])
    assert run.revision() == 0


def test_file_without_hard_links_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", full)
    synced = iter([None, "full"])
    monkeypatch.setattr(os, "fsync", lambda _: full(tmp_path) if next(synced) else None)
    with pytest.raises(OSError, match="No space"):
        files.exclusive_write_text(tmp_path / "config.yaml", "a: 1\n")
    assert list(tmp_path.iterdir()) == []


def test_configuration_that_another_process_is_freezing_is_no_strange_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.77.abcdef01.tmp").touch()
    assert RunDir.create({"a": 1}, path=tmp_path / "run").created


def test_end_of_an_attempt_is_decided_and_recorded_on_a_full_disk(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = run.heartbeats_path(1) / "rank_00000.json"
    beat.parent.mkdir(parents=True)
    beat.touch()

    follow = Supervisor._follow

    def fills_up(*_: Any) -> Any:
        # All small files of the run from now on: nothing fits until the signs of life are gone.
        monkeypatch.setattr(files, "_write_temporary", full)
        monkeypatch.setattr("launchers.lifecycle.supervise.record_end", full)
        monkeypatch.setattr(journal, "append", full_until(lambda: not beat.exists(), journal.append))
        return follow(*_)

    monkeypatch.setattr(Supervisor, "_follow", fills_up)
    config = SimpleNamespace(launcher=LocalConfig(max_restarts=0), lifecycle=LifecycleConfig())
    with Lease.acquire(run) as lease:
        outcome = Supervisor(
            run, LocalBackend(), lease, cast(Config, config), program=["/bin/false"], command=["test"]
        ).supervise()
    assert outcome.decision.action == "stop"
    assert [entry["event"] for entry in journal.read_journal(run)] == ["attempt_started", "attempt_ended"]


@pytest.mark.parametrize("max_restarts", [0, 5])
def test_end_that_cannot_be_journalled_is_told_in_one_message(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], max_restarts: int
) -> None:
    follow = Supervisor._follow

    def fills_up(*_: Any) -> Any:
        monkeypatch.setattr(files, "_write_temporary", full)
        monkeypatch.setattr(MetricsLog, "write", full)
        monkeypatch.setattr(journal, "append", full)
        return follow(*_)

    monkeypatch.setattr(Supervisor, "_follow", fills_up)
    config = SimpleNamespace(launcher=LocalConfig(max_restarts=max_restarts), lifecycle=LifecycleConfig())
    with Lease.acquire(run, job="7", life=0) as lease:
        outcome = Supervisor(
            run, LocalBackend(), lease, cast(Config, config), program=["/bin/false"], command=["test"]
        ).supervise()
    # No further attempt: it would find no room either.
    assert (outcome.code, outcome.decision.action, outcome.decision.at_once) == (1, "stop", False)
    said = capsys.readouterr().err
    assert said.count("; make room there, then continue with: pretrain resume") == 1
    assert "attempt 1 ended (user_error: " in said
    assert "takes no more files (No space left on device; make room there): rank 0" in said

    monkeypatch.undo()
    with Lease.acquire(run, job="7", life=1) as lease:
        Supervisor(run, LocalBackend(), lease, cast(Config, config), program=["/bin/true"], command=["t"]).supervise()
    ended = [entry for entry in journal.read_journal(run) if entry["event"] == "attempt_ended"]
    assert [(entry["attempt"], entry["exit_class"]) for entry in ended] == [(1, "killed"), (2, "finished")]


def test_supervisor_that_cannot_go_on_says_why_and_the_next_start_knows(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(job, "check", lambda tree: SimpleNamespace(launcher=SlurmConfig()))
    monkeypatch.setattr(job, "tell_tracker", lambda *_, **__: True)
    monkeypatch.setattr(job.Allocation, "read", lambda **_: None)

    def supervise(*_: Any) -> NoReturn:
        with Lease.acquire(run):
            journal.append(run, "attempt_started", attempt=1, launcher="slurm", job=7, nodes=["n1"], num_processes=1)
            full(run.metrics_path)

    monkeypatch.setattr(job, "_supervise", supervise)
    assert job.main([str(run.path)]) == 1
    said = capsys.readouterr().err
    assert f"{run.metrics_path}: No space left on device; make room there, then continue with: pretrain resume" in said
    assert "Traceback" not in said
    entry = journal.read_journal(run)[-1]
    assert (entry["event"], entry["job"]) == ("gave_up", 7)

    summary = summarise(run.path)
    assert (summary.state, "No space left" in str(summary.note)) == ("failed", True)

    config = SimpleNamespace(launcher=LocalConfig(), lifecycle=LifecycleConfig())
    with Lease.acquire(run) as lease:
        Supervisor(run, LocalBackend(), lease, cast(Config, config), program=["/bin/true"], command=["t"]).supervise()
    ended = next(entry for entry in journal.read_journal(run) if entry["event"] == "attempt_ended")
    assert (ended["attempt"], ended["exit_class"]) == (1, "crash")
    assert "gave up" in ended["reason"]
    assert "No space left" in ended["reason"]


def test_lease_that_cannot_be_given_back_is_no_fault(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease.acquire(run)
    monkeypatch.setattr(files, "_write_temporary", full)
    lease.release()
    monkeypatch.undo()
    with pytest.raises(LeaseHeldError):
        Lease.acquire(run)
    with Lease.acquire(run, after=lease) as second:
        assert second.attempt == 2


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; make room there"),
        (errno.EDQUOT, "Disk quota exceeded; make room there, or have the quota raised"),
        (errno.EROFS, "Read-only file system; have the file system mounted for writing"),
    ],
)
def test_each_lack_of_room_has_its_way_out(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, words: str
) -> None:
    def refuse(path: Path, *_: Any) -> NoReturn:
        raise OSError(number, os.strerror(number), str(path))

    assert guarded(lambda: refuse(Path("/runs/x"))) == 1
    assert capsys.readouterr().err == f"error: /runs/x: {words}, then try again\n"
    assert job._gave_up(None, run.path, OSError(number, os.strerror(number), "/runs/x")) == 1
    assert f"error: /runs/x: {words}, then continue with: pretrain resume {run.path}" in capsys.readouterr().err
    monkeypatch.setattr(evidence, "atomic_write_text", refuse)
    assert evidence._refusal(run, 1) == f"{run.path} takes no more files ({words})"


def test_a_fault_of_the_file_system_is_no_lack_of_room(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *_: Any) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(evidence, "atomic_write_text", fail)
    assert evidence._refusal(run, 1) is None
    with pytest.raises(OSError, match="Input/output error"):
        guarded(lambda: fail(Path("/runs/x")))
