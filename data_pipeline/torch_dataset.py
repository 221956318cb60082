"""The same order for torch's ``DataLoader`` and torchdata's ``StatefulDataLoader``. Imports torch.

The training loop does not need it: one thread is faster for text. It is for those who bring a loop of their own, and
for decoding that holds Python's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from data_pipeline.loader import check_loader_state, loader_state, micro_batch_indices, step_rows
from data_pipeline.source import SampleSource


class MicroBatchDataset(IterableDataset[dict[str, torch.Tensor]]):
    """Micro-batches of one data-parallel rank, in order, for any number of loader workers (use ``batch_size=None``).

    ``open_source`` is called in each worker: a source is not sent between processes. Worker w of W makes the
    micro-batches w, w + W, w + 2 W ..., which is the order in which a DataLoader asks its workers.

    ``state_dict`` holds the position of one worker, which suits ``StatefulDataLoader`` with a constant number of
    workers. To change ranks, workers or batch sizes, start a new loader at ``start_sample``, the samples consumed.

    Raises ValueError when the batch sizes do not divide, or ``start_sample`` is no multiple of the global batch.
    """

    def __init__(
        self,
        open_source: Callable[[], SampleSource],
        *,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_sample: int = 0,
    ) -> None:
        if min(global_batch, micro_batch, dp_size) < 1 or global_batch % (micro_batch * dp_size):
            raise ValueError(
                f"global batch {global_batch} is not a positive multiple of micro-batch {micro_batch} x "
                f"data-parallel size {dp_size}. What to do: change one of the three."
            )
        if start_sample % global_batch:
            raise ValueError(
                f"start_sample {start_sample} is no multiple of the global batch {global_batch}. "
                "What to do: start where a step begins."
            )
        self._open_source = open_source
        self._layout = (global_batch, micro_batch, dp_rank, dp_size)
        self._per_step = global_batch // (micro_batch * dp_size)
        self._start = start_sample // global_batch * self._per_step
        self._next: int | None = None  # number of the next micro-batch of this worker
        self._source: SampleSource | None = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        source = self._opened()
        _, num_workers = _worker()
        number = self._number()
        num_samples = source.num_samples
        while num_samples is None or number // self._per_step * self._layout[0] < num_samples:
            step, place = divmod(number, self._per_step)
            indices = micro_batch_indices(step, *self._layout)[place]
            rows = step_rows(source, indices, num_samples, lean=False)
            number += num_workers
            self._next = number
            yield {name: torch.from_numpy(array) for name, array in rows.items()}
        self._next = None

    def state_dict(self) -> dict[str, Any]:
        """This worker's position: JSON."""
        number = self._number()
        samples = number // self._per_step * self._layout[0]
        return {"next": number, "layout": self._full_layout(), "order": loader_state(self._opened(), samples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position; raises ValueError when it belongs to another order or layout."""
        samples = check_loader_state(self._opened(), state["order"])
        if state["layout"] != self._full_layout():
            raise ValueError(
                f"the state belongs to a loader with {state['layout']}, this one has {self._full_layout()}. "
                f"What to do: keep the layout, or begin a new loader with start_sample={samples}."
            )
        self._next = state["next"]

    def _number(self) -> int:
        """Number of the next micro-batch of this worker."""
        return self._start + _worker()[0] if self._next is None else self._next

    def _full_layout(self) -> dict[str, int]:
        names = ("global_batch", "micro_batch", "dp_rank", "dp_size")
        worker, num_workers = _worker()
        return dict(zip(names, self._layout, strict=True)) | {"worker": worker, "num_workers": num_workers}

    def _opened(self) -> SampleSource:
        if self._source is None:
            self._source = self._open_source()
        return self._source


def _worker() -> tuple[int, int]:
    """Number of this loader worker, and how many there are."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
