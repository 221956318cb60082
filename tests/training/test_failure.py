"""Exit codes of failures."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import DamagedDataError, FetchError
from launchers.exit_codes import ExitCode
from launchers.lease import FencedError
from launchers.lifecycle.end_record import read_end_records
from launchers.run_dir import RunDir, RunDirectoryError
from pretrain.checkpoint.manifest import CheckpointError, CheckpointSaveError, CorruptCheckpointError
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import Save
from pretrain.training.failure import exit_code_of, guarded, lost_peer, record_end_of_rank
from pretrain.training.loop import DataEndError, DataFailureError, DataUnavailableError, NonFiniteError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorruptCheckpointError("damaged"), ExitCode.CORRUPTED_CHECKPOINT),
        (CheckpointError("another model"), ExitCode.INVALID_INPUT),
        (ValueError("wrong"), ExitCode.INVALID_INPUT),
        (RunDirectoryError("held"), ExitCode.RUN_DIRECTORY_REFUSED),
        (FencedError("lost"), ExitCode.RUN_DIRECTORY_REFUSED),
        (CheckpointSaveError("a gap"), ExitCode.FAILED),
        (CheckpointSaveError("rank 1: OSError: [Errno 28] No space left on device"), ExitCode.RUN_DIRECTORY_REFUSED),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ExitCode.RUN_DIRECTORY_REFUSED),
        (OSError(errno.EIO, "Input/output error"), ExitCode.FAILED),
        (KeyError("bug"), ExitCode.FAILED),
        (NonFiniteError("step 3"), ExitCode.NONFINITE),
        (DataFailureError("bit flip"), ExitCode.DATA_FAULT),
        (DataUnavailableError("no answer"), ExitCode.DATA_FAULT),
        (DataEndError("too few samples"), ExitCode.INVALID_INPUT),
        (DamagedDataError("bit flip"), ExitCode.DATA_FAULT),
        (FetchError("no answer"), ExitCode.DATA_FAULT),
        (torch.OutOfMemoryError("CUDA out of memory."), ExitCode.DEVICE_MEMORY),
        (RuntimeError("CUDA error: out of memory"), ExitCode.DEVICE_MEMORY),
        (MemoryError(), ExitCode.HOST_MEMORY),
        (OSError(12, "Cannot allocate memory"), ExitCode.HOST_MEMORY),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), ExitCode.NODE_FAULT),
        (RuntimeError("shapes do not match"), ExitCode.FAILED),
    ],
)
def test_each_failure_has_its_exit_code(error: Exception, code: ExitCode) -> None:
    assert exit_code_of(error) == code


def test_a_lease_lost_during_a_save_is_a_refused_run_directory(tmp_path: Path) -> None:
    def fence() -> None:
        raise FencedError("lost to attempt 2")

    save = Save(CheckpointStore(tmp_path), step=1, attempt=1, rank=0, gather=lambda value: [value], fence=fence)
    with pytest.raises(CheckpointSaveError, match="lost to attempt 2") as caught:
        save.write([], {})
    assert exit_code_of(caught.value) == ExitCode.RUN_DIRECTORY_REFUSED


def test_the_host_allocator_of_torch_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert exit_code_of(caught.value) == ExitCode.HOST_MEMORY


def test_a_lost_peer_is_told_from_a_cause() -> None:
    gloo = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:28049: Connection reset by peer. This is typically"
    assert lost_peer(RuntimeError(gloo))
    assert lost_peer(RuntimeError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"))
    assert not lost_peer(RuntimeError("shapes do not match"))
    assert not lost_peer(FetchError("http://host/file: Connection reset by peer"))  # a fault of the data's store
    wrapped = CheckpointSaveError("not saved")
    wrapped.__cause__ = RuntimeError(gloo)
    assert lost_peer(wrapped)


def test_a_rank_leaves_an_account_of_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create({"run": {"name": "demo"}}, path=tmp_path / "run")
    record_end_of_rank(run.path, 0)  # no rank: nothing is written
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("PRETRAIN_ATTEMPT", "2")
    record_end_of_rank(run.path, 0)  # no such attempt
    run.attempt_path(2).mkdir(parents=True)
    record_end_of_rank(run.path, ExitCode.NONFINITE, NonFiniteError("step 3"))
    (record,) = read_end_records(run, 2).values()
    assert (record.rank, record.code, record.exit_class) == (3, 5, "nonfinite")
    assert record.message == "NonFiniteError: step 3"


def test_bugs_are_not_hidden_from_their_trace() -> None:
    def bug() -> int:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        guarded(bug)
