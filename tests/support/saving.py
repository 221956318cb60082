"""Saving small checkpoints without an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import Save
from pretrain.parallel.shard import Shard


def whole(name: str, slot: str, values: torch.Tensor) -> Fragment:
    """A tensor as one fragment."""
    shape = tuple(values.shape)
    return Fragment(name, slot, shape, 0, values.reshape(-1), Shard.whole(shape))


def new_save(root: Path, step: int, rank: int = 0, **changes: Any) -> Save:
    """A save of one process, unless ``changes`` say otherwise."""
    arguments: dict[str, Any] = {"attempt": 1, "gather": lambda value: [value], "fence": lambda: None}
    return Save(CheckpointStore(root), step=step, rank=rank, **(arguments | changes))


class Gather:
    """``gather`` of ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait(60)
            result = list(self.values)
            self.barrier.wait(60)
            return result

        return gather


def save_by_ranks(
    root: Path, step: int, ranks: Sequence[list[Fragment]], training: dict[str, Any] | None = None
) -> Path:
    """A checkpoint with one file for each rank's fragments."""
    gather = Gather(len(ranks))
    paths: dict[int, Path] = {}
    failures: list[Exception] = []

    def run(rank: int) -> None:
        save = new_save(root, step, rank, gather=gather.of(rank))
        try:
            paths[rank] = save.write(ranks[rank], training if training is not None else {"step": step}).path
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return paths[0]
