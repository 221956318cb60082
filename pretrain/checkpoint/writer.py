"""Saving canonical checkpoints: every rank writes its own fragments, rank 0 commits when all are done.

A save is synchronous (:meth:`Save.write`: fragments are streamed while training waits) or asynchronous
(:meth:`Save.start`: training waits for a copy in host memory only; :meth:`Save.finish` publishes). Either way the files
lie under a temporary name until all of them are complete on all ranks.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.manifest import MANIFEST_NAME, CheckpointSaveError, Manifest, TensorEntry
from pretrain.checkpoint.rank_file import HostMemory, Piece, Snapshot, rank_file_name, write_rank_file
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.files import atomic_write_text


@dataclass(frozen=True)
class Saved:
    """A published checkpoint: its folder, bytes of all files, and seconds that the slowest rank took to write."""

    step: int
    path: Path
    num_bytes: int
    write_s: float


@dataclass(frozen=True)
class _Report:
    """What one rank says of its file."""

    num_bytes: int
    xxh3: str
    write_s: float
    pieces: list[Piece]


class Save:
    """One save of one step. All ranks make the same calls; either all return or all raise ``CheckpointSaveError``.

    ``gather(value)`` returns every rank's value on every rank; ``fence()`` raises when this attempt no longer holds
    the run directory. A failed save leaves no final name behind; its error holds every rank's reason (disk full, lost
    lease, ...).
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        step: int,
        attempt: int,
        rank: int,
        gather: Callable[[Any], list[Any]],
        fence: Callable[[], None],
    ) -> None:
        self.step = step
        self._store = store
        self._rank = rank
        self._gather = gather
        self._fence = fence
        self._folder = store.temporary_path(step, attempt)
        self._path = self._folder / rank_file_name(rank)
        self._training: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._outcome: _Report | Exception | None = None

    def write(self, fragments: Iterable[Fragment], training: dict[str, Any]) -> Saved:
        """Save while training waits, one fragment in host memory at a time."""
        self._training = training

        def write() -> _Report:
            started = time.perf_counter()
            facts, pieces = write_rank_file(self._path, fragments)
            return _Report(facts["bytes"], facts["xxh3"], time.perf_counter() - started, pieces)

        self._together(self._prepare if self._rank == 0 else None)
        return self._publish(self._together(write))

    def start(self, fragments: Iterable[Fragment], training: dict[str, Any], memory: HostMemory) -> None:
        """Copy state to ``memory`` and write it in a background thread; ``memory`` is in use until :meth:`finish`."""
        assert self._thread is None
        self._training = copy.deepcopy(training)
        snapshots = []

        def prepare() -> None:
            if self._rank == 0:
                self._prepare()
            snapshots.append(memory.take(fragments, self._path.name))

        # No rank writes before the folder exists, and none goes on when another has no memory for its copy.
        self._together(prepare)
        self._thread = threading.Thread(
            target=self._write_behind, args=(snapshots[0],), name=f"checkpoint-{self.step}", daemon=True
        )
        self._thread.start()

    def ready(self) -> bool:
        """Whether this rank's file is written, or its writing failed. Local."""
        return self._thread is not None and not self._thread.is_alive()

    def finish(self) -> Saved:
        """Wait for all ranks' files and publish the checkpoint."""
        assert self._thread is not None
        self._thread.join()

        def result() -> _Report:
            if isinstance(self._outcome, Exception):
                raise self._outcome
            assert self._outcome is not None
            return self._outcome

        return self._publish(self._together(result))

    def _write_behind(self, snapshot: Snapshot) -> None:
        started = time.perf_counter()
        try:
            facts = snapshot.write(self._path)
            self._outcome = _Report(facts["bytes"], facts["xxh3"], time.perf_counter() - started, snapshot.pieces)
        except Exception as error:
            self._outcome = error

    def _prepare(self) -> None:
        self._fence()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def _publish(self, reports: list[_Report]) -> Saved:
        def commit() -> None:
            manifest = _merge(reports, self.step, self._training)
            atomic_write_text(self._folder / MANIFEST_NAME, manifest.to_json())
            self._fence()
            self._store.commit(self._folder, self.step)

        self._together(commit if self._rank == 0 else None)
        return Saved(
            self.step,
            self._store.path(self.step),
            sum(report.num_bytes for report in reports),
            max(report.write_s for report in reports),
        )

    def _together(self, action: Callable[[], Any] | None) -> list[Any]:
        """Run ``action`` here, share results; raise the same error everywhere if any rank failed."""
        result, failure, cause = None, None, None
        try:
            result = action() if action else None
        except Exception as error:
            failure, cause = f"{type(error).__name__}: {error}", error
        outcomes = self._gather((result, failure))
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
        if failures:
            if self._rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
            raise CheckpointSaveError(
                "The checkpoint was not saved; earlier checkpoints are untouched. " + "; ".join(failures)
            ) from cause
        return [value for value, _ in outcomes]


def _merge(reports: list[_Report], step: int, training: dict[str, Any]) -> Manifest:
    tensors: dict[str, TensorEntry] = {}
    files = {}
    for rank, report in enumerate(reports):
        files[rank_file_name(rank)] = {"bytes": report.num_bytes, "xxh3": report.xxh3}
        for piece in report.pieces:
            entry = tensors.setdefault(piece.tensor, TensorEntry(piece.shape, piece.dtype))
            if (entry.shape, entry.dtype) != (piece.shape, piece.dtype):
                raise CheckpointSaveError(
                    f"{piece.tensor}: rank {rank} has {piece.dtype} {list(piece.shape)}, "
                    f"another rank {entry.dtype} {list(entry.shape)}"
                )
            entry.fragments.append(piece.entry)
    for key, entry in tensors.items():
        entry.check_coverage(key)
    return Manifest(step=step, tensors=tensors, files=files, training=training)
