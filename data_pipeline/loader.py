"""Micro-batches of each step for one data-parallel rank, prefetched by one blocking thread.

One thread, not worker processes: handing a batch of text between processes costs more than making it. It
waits on a bounded queue and never polls, so it takes no cycles from the training thread.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.batch import pad_rows, split_lean, unpack
from data_pipeline.source import SampleSource
from data_pipeline.store.manifest import digest_of

STATE_VERSION = 1

_PREFETCHED_GROUPS = 2
# Handing over costs two switches between threads. Steps that are made faster than this are handed over in groups.
_GROUP_SECONDS = 0.016
_LARGEST_GROUP = 64
_LARGEST_GROUP_ROWS = 4096
_ASK_INTERVAL_S = 0.2
_STUCK_AFTER_S = 1.0
MicroBatches = list[dict[str, np.ndarray]]


def loader_state(source: SampleSource, samples: int) -> dict[str, Any]:
    """The state of an order after ``samples`` global samples: JSON, far below 1 KB.

    ``timeline`` is a digest of what had taken effect by then (added shards, phases of weights): the part of the
    configuration that a continued run may extend, but not change.
    """
    return {
        "version": STATE_VERSION,
        "samples": samples,
        "fingerprint": source.fingerprint,
        "timeline": _past(getattr(source, "timeline", []), samples),
    }


def check_loader_state(source: SampleSource, state: dict[str, Any]) -> int:
    """The number of samples to go on from; raises ValueError when ``source`` is not the order of ``state``."""
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"the data state has version {state.get('version')!r}, this program reads {STATE_VERSION}. "
            "What to do: continue the run with the version of the program that wrote it."
        )
    samples = int(state["samples"])
    if state["fingerprint"] != source.fingerprint:
        raise ValueError(
            f"the data state belongs to an order with fingerprint {state['fingerprint']}, this one has "
            f"{source.fingerprint}: samples would be lost or repeated. What to do: restore data set, sequence length, "
            "packing, number of lanes and seed, or start a new run."
        )
    check_timeline(getattr(source, "timeline", []), state)
    return samples


def check_timeline(timeline: list[list[Any]], state: dict[str, Any]) -> None:
    """Raises ValueError when ``timeline`` changes what had taken effect by the time of ``state``."""
    samples = int(state["samples"])
    if state["timeline"] != _past(timeline, samples):
        raise ValueError(
            f"what had taken effect within the first {samples} samples (appended shards or phases of weights) is not "
            f"what the configuration says now. What to do: leave entries below from_sample {samples} as they were; "
            "later ones may be added or changed."
        )


def _past(timeline: list[list[Any]], samples: int) -> str:
    return digest_of([entry for entry in timeline if entry[0] < samples])


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _End:
    pass


def micro_batch_indices(step: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> list[range]:
    """Global sample indices of each micro-batch of ``dp_rank`` in ``step`` (0-based).

    Micro-batch m of rank r is ``step * global_batch + m * (micro_batch * dp_size) + r * micro_batch + [0,
    micro_batch)``, so the global batch is the same set for any number of ranks and any micro-batch.
    """
    first = step * global_batch + dp_rank * micro_batch
    stride = micro_batch * dp_size
    return [range(start, start + micro_batch) for start in range(first, first + global_batch, stride)]


class StepLoader:
    """Iterates over steps, from ``start_step`` on; each item is the list of this rank's micro-batches.

    An endless source gives an endless loader. A finite one ends after ``ceil(num_samples / global_batch)``
    steps; the rows past its end are padding with no target, so that every rank sees the same number of
    equal-shaped micro-batches. An error in the thread is raised in the consumer, at the step that it belongs to and
    at every call after. Steps in ``skip`` are left out, and not read. With ``lean`` text comes as lean batches
    (:mod:`data_pipeline.batch`). ``while_waiting`` is called several times a second while a step is waited for;
    what it raises ends the wait.

    Raises ValueError when ``global_batch`` is not a multiple of ``micro_batch * dp_size``.
    """

    def __init__(
        self,
        source: SampleSource,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        start_step: int = 0,
        lean: bool = False,
        while_waiting: Callable[[], None] | None = None,
        skip: Collection[int] = (),
    ) -> None:
        if min(global_batch, micro_batch, dp_size) < 1 or global_batch % (micro_batch * dp_size):
            raise ValueError(
                f"global batch {global_batch} is not a positive multiple of micro-batch {micro_batch} x "
                f"data-parallel size {dp_size}. What to do: change one of the three."
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} is outside the {dp_size} ranks")
        self.step = start_step
        self._source = source
        self._skip = frozenset(skip)
        self._lean = lean
        # Steps past the end of a finite source are padded one by one.
        own_rows = max(1, global_batch // dp_size)
        self._largest_group = (
            1 if source.num_samples is not None else max(1, min(_LARGEST_GROUP, _LARGEST_GROUP_ROWS // own_rows))
        )
        self._layout = (global_batch, micro_batch, dp_rank, dp_size)
        self._queue: queue.Queue[list[MicroBatches | _Failure | _End]] = queue.Queue(_PREFETCHED_GROUPS)
        self._group: Iterator[MicroBatches | _Failure | _End] = iter(())
        self._while_waiting = while_waiting
        self._gave_up = False
        self._stopping = threading.Event()
        self._made = start_step  # steps put into the queue
        self._last: _Failure | _End | None = None
        self._thread = threading.Thread(target=self._produce, args=(start_step,), name="data-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[MicroBatches]:
        return self

    def __next__(self) -> MicroBatches:
        item = self._last if self._last is not None else self._next_item()
        if isinstance(item, _Failure):
            self._last = item
            raise item.error
        if isinstance(item, _End):
            self._last = item
            raise StopIteration
        self.step = self._steps_from(self.step, 1)[0] + 1
        return item

    @property
    def ready_steps(self) -> int:
        """Steps that lie ready, made ahead and not yet handed out; may be asked from any thread."""
        return max(0, self._made - self.step)

    def state_dict(self) -> dict[str, Any]:
        """All the state there is: samples handed out, and whose order they count in. The same on every rank."""
        return loader_state(self._source, self.step * self._layout[0])

    def close(self) -> None:
        """Stop the thread and wait for it. The source stays open. Iterating afterwards ends at once.

        After a wait that was given up the thread may be stuck in its source for ever, and is left behind.
        """
        self._stopping.set()
        # The thread may be blocked on a full queue; emptied once, the queue has room for all that it can
        # still put.
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._thread.join(_STUCK_AFTER_S if self._gave_up else None)
        self._group = iter(())
        if not isinstance(self._last, _Failure):
            self._last = _End()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _next_item(self) -> MicroBatches | _Failure | _End:
        item = next(self._group, None)
        if item is None:
            self._group = iter(self._wait())
            item = next(self._group)
        return item

    def _wait(self) -> list[MicroBatches | _Failure | _End]:
        if self._while_waiting is None:
            return self._queue.get()
        while True:
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_ASK_INTERVAL_S)
            try:
                self._while_waiting()
            except BaseException:
                self._gave_up = True
                raise

    def _produce(self, step: int) -> None:
        """Put groups of steps: the first alone, so that nothing waits for a group to fill, then as fast steps allow."""
        try:
            num_samples = self._source.num_samples
            size = 1
            while not self._stopping.is_set():
                steps = self._steps_from(step, size)
                if num_samples is not None and steps[0] * self._layout[0] >= num_samples:
                    self._queue.put([_End()])
                    return
                started = time.perf_counter()
                try:
                    group = self._group_of(steps)
                except Exception as error:
                    if size == 1 or isinstance(error, OSError):  # what cannot be fetched was tried for long enough
                        raise
                    size = 1  # once more, step by step: what comes before the fault is handed over
                    continue
                seconds = time.perf_counter() - started
                self._queue.put(group)
                step = steps[-1] + 1
                self._made = step
                if seconds < _GROUP_SECONDS / 2:
                    size = min(2 * size, self._largest_group)
                elif seconds > 2 * _GROUP_SECONDS:
                    size = max(1, size // 2)
        except BaseException as error:  # handed over whole: the consumer decides
            self._queue.put([_Failure(error)])

    def _steps_from(self, first: int, size: int) -> list[int]:
        """``size`` steps from ``first`` on, without those to skip."""
        return list(itertools.islice((step for step in itertools.count(first) if step not in self._skip), size))

    def _group_of(self, steps: list[int]) -> list[MicroBatches | _Failure | _End]:
        """These steps; where the source is lean, all their rows are read at once."""
        ranges = [micro_batch_indices(step, *self._layout) for step in steps]
        read_lean = getattr(self._source, "lean", None)
        if len(steps) == 1 or read_lean is None:
            num_samples = self._source.num_samples
            return [[step_rows(self._source, rows, num_samples, self._lean) for rows in step] for step in ranges]
        micro_batches = [rows for step in ranges for rows in step]
        ids = [np.arange(rows.start, rows.stop, dtype=np.int64) for rows in micro_batches]
        parts = split_lean(read_lean(np.concatenate(ids)), [len(rows) for rows in micro_batches])
        batches = [
            (part if self._lean else unpack(part)) | {"sample_ids": own} for part, own in zip(parts, ids, strict=True)
        ]
        count = len(ranges[0])
        return [batches[at : at + count] for at in range(0, len(batches), count)]


def step_rows(source: SampleSource, indices: range, num_samples: int | None, lean: bool) -> dict[str, np.ndarray]:
    """Rows ``indices`` of ``source`` with their ``sample_ids`` (int64); those past the end hold no target."""
    present = len(indices) if num_samples is None else max(0, min(len(indices), num_samples - indices.start))
    if present < len(indices) and hasattr(source, "padded_batch"):  # its arrays are not all by row
        return source.padded_batch(indices, present) | {
            "sample_ids": np.arange(indices.start, indices.stop, dtype=np.int64)
        }
    if hasattr(source, "lean"):
        batch = pad_rows(source.lean(indices[:present]), len(indices))
        return (batch if lean else unpack(batch)) | {
            "sample_ids": np.arange(indices.start, indices.stop, dtype=np.int64)
        }
    batch = source.batch([index if number < present else 0 for number, index in enumerate(indices)])
    if present < len(indices):
        for name, array in batch.items():
            array[present:] = -1 if name == "seq_idx" else 0
    return batch | {"sample_ids": np.arange(indices.start, indices.stop, dtype=np.int64)}
