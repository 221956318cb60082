"""Exit codes of failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers.exit_codes import ExitCode
from launchers.lease import FencedError
from launchers.run_dir import RunDirectoryError
from pretrain.checkpoint.manifest import CheckpointError, CheckpointSaveError, CorruptCheckpointError
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import Save
from pretrain.training.failure import exit_code_of, guarded


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorruptCheckpointError("damaged"), ExitCode.CORRUPTED_CHECKPOINT),
        (CheckpointError("another model"), ExitCode.INVALID_INPUT),
        (ValueError("wrong"), ExitCode.INVALID_INPUT),
        (RunDirectoryError("held"), ExitCode.RUN_DIRECTORY_REFUSED),
        (FencedError("lost"), ExitCode.RUN_DIRECTORY_REFUSED),
        (CheckpointSaveError("disk full"), ExitCode.FAILED),
        (KeyError("bug"), ExitCode.FAILED),
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


def test_bugs_are_not_hidden_from_their_trace() -> None:
    def bug() -> int:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        guarded(bug)
