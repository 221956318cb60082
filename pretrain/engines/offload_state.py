"""Canonical state of optimizer state that is offloaded, both ways, for every engine whose shards it holds.

Where a value lies (host, device, low bits beside a weight), how state is cut into subgroups and what the plan is shows
in none of it: a checkpoint is what the same run without offloading would have written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from pretrain.checkpoint.fragment import Fragment, LazyFragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.engines.flat_state import overlaps, paste
from pretrain.parallel.canonical import CanonicalParameter

if TYPE_CHECKING:
    from pretrain.optim.offload.states import OffloadedStates

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = 1 << 24
"""Elements that are copied at a time: 64 MiB of host memory, whatever the size of a parameter."""


class Held(NamedTuple):
    """Target number ``target`` of the offloaded states holds flat elements of ``parameter`` from ``start`` on."""

    parameter: CanonicalParameter
    start: int
    target: int


def export_states(states: OffloadedStates, held: Iterable[Held], step: float) -> Iterator[Fragment]:
    """Masters and, after the first step, moments; their values are copied to the host when they are asked for."""
    states.synchronize()
    sizes = _sizes(states)
    for parameter, first, target in held:
        for slot in (MASTER, *MOMENTS) if step > 0 else (MASTER,):
            for start, stop in _chunks(sizes[target]):
                for part, low, high in overlaps(parameter, first + start, stop - start):
                    read = partial(states.read, target, slot, low - first, high - first)
                    yield LazyFragment(
                        part.name, slot, part.shape, low - part.start, part.shard, high - low, torch.float32, read
                    )


def import_states(states: OffloadedStates, held: Iterable[Held], reader: CheckpointReader, step: float) -> None:
    """Take over everything from ``reader``: masters, weights as they are rounded from them, moments (0 at step 0)."""
    states.reset()
    fill_states(states, held, reader, step)
    states.synchronize()


def fill_states(states: OffloadedStates, held: Iterable[Held], reader: CheckpointReader, step: float) -> None:
    """Take over what is ``held``, whose moments :meth:`OffloadedStates.reset` has cleared."""
    sizes = _sizes(states)
    for parameter, first, target in held:
        for slot in (MASTER, *MOMENTS) if step > 0 else (MASTER,):
            for start, stop in _chunks(sizes[target]):
                values = torch.empty(stop - start, dtype=torch.float32)
                # The reader knows by itself whether masters or only weights were saved.
                paste(parameter, first + start, values, reader, None if slot == MASTER else slot)
                states.write(target, slot, values, start)


def _sizes(states: OffloadedStates) -> dict[int, int]:
    """Elements of each target."""
    sizes: dict[int, int] = {}
    for subgroup in states.subgroups:
        for segment in subgroup.segments:
            sizes[segment.target] = max(sizes.get(segment.target, 0), segment.stop)
    return sizes


def _chunks(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, CHUNK):
        yield start, min(numel, start + CHUNK)
