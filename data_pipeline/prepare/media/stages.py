"""The stages of preparing media, one unit of work at a time, and how to see which units are done.

``convert`` has one unit for each piece of the input, ``write`` one for each shard. A unit is done when its marker is
there (the index of a spill, the report of a shard). Units do not depend on who does them, nor on the order; doing one
twice gives the same bytes.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.prepare.media.convert import Converter, make_converter
from data_pipeline.prepare.media.inputs import LINES
from data_pipeline.prepare.media.readers import RejectError, read_piece
from data_pipeline.prepare.media.request import REQUEST_NAME, MediaRequest, held_out_below
from data_pipeline.prepare.media.shards import SampleShardWriter
from data_pipeline.prepare.media.spill import INDEX, SpillWriter, cut_shards, merged_facts, read_index, read_spilled
from data_pipeline.prepare.metering import Counts, Drops, Meter
from data_pipeline.prepare.records import Dropped
from data_pipeline.prepare.workspace import WorkFolder
from data_pipeline.prepare.writer import KEY_PREFIXES

CONVERT, WRITE = "convert", "write"
PLAN_NAME, ORDER_NAME = "plan.json", "order.npy"
_MOST_OPEN = 256
_PLACED = np.dtype([("piece", "<u4"), ("row", INDEX)])


def spill_name(piece: int) -> str:
    """Name of a piece's spill without its suffix."""
    return f"spill/{piece:08d}"


def find_converted(work: WorkFolder, num_pieces: int) -> set[int]:
    """Pieces whose spills are there."""
    found = {int(path.stem) for path in (work.path / "spill").glob("*.npz")}
    return {piece for piece in found if piece < num_pieces and (work.path / f"{spill_name(piece)}.bin").exists()}


def find_written(work: WorkFolder, shards: list[dict[str, Any]]) -> set[int]:
    """Shards that are there with their sidecars and reports."""
    return {
        number
        for number, shard in enumerate(shards)
        if all(
            (work.path / name).exists()
            for name in (f"dataset/{shard['name']}.tar", f"dataset/{shard['name']}.json", report_name(shard["name"]))
        )
    }


def report_name(shard: str) -> str:
    """Name of the report of a written shard."""
    return f"shards/{shard}.json"


def make_plan(work: WorkFolder, request: MediaRequest) -> dict[str, Any]:
    """The order of all samples and the shards they make, from the indexes of all spills.

    A pure function of the spills: every task that gets here writes the same. Raises DamagedDataError.
    """
    plan: dict[str, Any] | None = work.read_json(PLAN_NAME)
    if plan is not None:
        return plan
    parts, abouts = [], []
    for piece in range(len(request.pieces)):
        rows, about = read_index(work.path / f"{spill_name(piece)}.npz")
        placed = np.empty(len(rows), dtype=_PLACED)
        placed["piece"], placed["row"] = piece, rows
        parts.append(placed)
        abouts.append(about)
    samples = np.concatenate(parts) if parts else np.empty(0, dtype=_PLACED)
    keys = samples["row"]["order"]
    samples = samples[np.lexsort((keys[:, 1], keys[:, 0]))]
    held = samples["row"]["split"] < np.uint64(held_out_below(request.options))
    if held.all():
        held[:] = False  # too few samples to hold any out
    shards = []
    first = 0
    splits = (("train", samples[~held]), ("validation", samples[held]))
    for split, own in splits:
        for number, (start, stop) in enumerate(cut_shards(own["row"]["stored"], request.options.shard_bytes)):
            shards.append(
                {
                    "name": f"{split}-{number:06d}",
                    "split": split,
                    "first": first + start,
                    "stop": first + stop,
                    "key": start,
                }
            )
        first += len(own)
    with work.create(ORDER_NAME) as stream:
        np.save(stream, np.concatenate([own for _, own in splits]), allow_pickle=False)
    drops = Drops.merged(about["drops"] for about in abouts)
    plan = {"shards": shards, "facts": merged_facts(abouts), "drops": drops.to_json(), "samples": len(samples)}
    work.write_json(PLAN_NAME, plan)
    return plan


class MediaStages:
    """Does units of the preparation in the work folder at ``path``; made anew in each process."""

    def __init__(self, path: Path, writer: str) -> None:
        self._work = WorkFolder(path, writer)

    def __call__(self, stage: str, unit: int, meter: Meter) -> None:
        """Do one unit. Raises ValueError for input that cannot be used, OSError when disk or network fail."""
        (self._convert if stage == CONVERT else self._write)(unit, meter)

    @cached_property
    def _request(self) -> MediaRequest:
        return MediaRequest.from_json(self._work.read_json(REQUEST_NAME))

    @cached_property
    def _converter(self) -> Converter:
        return make_converter(self._request.options, self._request.tokenizer, self._request.layout)

    @cached_property
    def _plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = self._work.read_json(PLAN_NAME)
        return plan

    @cached_property
    def _order(self) -> np.ndarray:
        return np.asarray(np.load(self._work.path / ORDER_NAME, mmap_mode="r", allow_pickle=False))

    def _convert(self, number: int, meter: Meter) -> None:
        piece = self._request.pieces[number]
        folder = os.path.dirname(piece.location) if piece.form == LINES else ""
        with self._work.create(f"{spill_name(number)}.bin") as stream:
            writer = SpillWriter(stream, self._request.options.seed)
            for raw in read_piece(piece, self._request.options):
                counts = Counts()
                try:
                    if raw.problem is not None:
                        raise raw.problem
                    sample = self._converter(raw, folder)
                    writer.add(raw.source, sample)
                    counts.documents, counts.bytes = 1, sum(len(data) for _, data in sample.members)
                except RejectError as error:
                    writer.drops.add(Dropped(raw.source, error.reason, error.detail))
                    counts.dropped[error.reason] += 1
                meter.add(counts)
        self._work.write(f"{spill_name(number)}.npz", writer.index())

    def _write(self, number: int, meter: Meter) -> None:
        shard = self._plan["shards"][number]
        name = shard["name"]
        with ExitStack() as stack, self._work.create(f"dataset/{name}.tar") as stream:
            opened: dict[int, tuple[BinaryIO, Path]] = {}
            prefix = KEY_PREFIXES[name.rpartition("-")[0]]
            writer = SampleShardWriter(stream, f"{name}.tar", shard["key"], prefix)
            for piece, row in self._order[shard["first"] : shard["stop"]]:
                if int(piece) not in opened:
                    if len(opened) >= _MOST_OPEN:
                        opened.pop(next(iter(opened)))[0].close()
                    path = self._work.path / f"{spill_name(int(piece))}.bin"
                    opened[int(piece)] = (stack.enter_context(open(path, "rb")), path)
                head, payloads = read_spilled(*opened[int(piece)], row)
                members = [
                    (extension, payload, xxh3)
                    for (extension, _, xxh3), payload in zip(head["members"], payloads, strict=True)
                ]
                writer.add(members, head["attributes"])
                meter.add(Counts(bytes=sum(map(len, payloads))))
            entry, sidecar, largest = writer.finish()
        self._work.write(f"dataset/{name}.json", sidecar)
        self._work.write_json(report_name(name), {"entry": entry, "largest": largest})
