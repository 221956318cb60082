"""The survey: one look at every document before anything is decided.

It is made where its result is needed: to train a tokenizer, or to hold out an exact share of a set that is
small enough for shares to be off otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.prepare import keys
from data_pipeline.prepare.metering import Counts, Drops, Meter
from data_pipeline.prepare.records import Dropped, Record, read_part
from data_pipeline.prepare.request import Request
from data_pipeline.prepare.workspace import WorkFolder

TRAINING_BYTES = 1 << 28
"""More text than this does not change the merges of a vocabulary of usual size, and the trainer holds its
words in memory."""

_EXACT_BYTES = 1 << 30
_FEW_FILES = 10_000
_BATCH = 1 << 20


def exact_split(request: Request) -> bool:
    """Whether the share to hold out is measured, not drawn: for sets of few bytes or few documents."""
    files = request.corpus.files
    few = len(files) < _FEW_FILES and all(file.format == "text" for file in files)
    small = request.corpus.size <= _EXACT_BYTES and all(file.size >= 0 for file in files)
    return request.options.validation_fraction > 0 and request.appends_to is None and (few or small)


def wanted(request: Request) -> bool:
    """Whether this preparation needs a survey."""
    return request.given is None or exact_split(request)


def sample_floor(request: Request) -> int:
    """Documents with a split key from here on may train the tokenizer: about four times as many as needed,
    and never the first to be held out."""
    share = min(1.0, 4 * TRAINING_BYTES / max(request.corpus.size, 1))
    return min(int((1 - share) * 2**64), 2**64 - 1)


def survey_piece(request: Request, work: WorkFolder, piece: int, meter: Meter) -> dict[str, Any]:
    """Write ``survey/P.keys`` (uint64 split key and size of the documents that matter) and ``P.text`` (those
    that may train a tokenizer, in the same order); returns counts and drops."""
    drops, counts = Drops(), Counts()
    rows = [np.empty((0, 2), np.uint64)]
    floor = np.uint64(sample_floor(request))
    exact = exact_split(request)
    with work.create(f"survey/{piece:06d}.text") as texts:
        for batch in batches(request, piece, meter, drops):
            split = keys.content_keys(
                keys.content_digests([record.raw for record in batch]), request.options.seed, "split"
            )
            sizes = np.array([len(record.raw) for record in batch], dtype=np.uint64)
            table = np.stack([split, sizes], axis=1)
            rows.append(table if exact else table[split >= floor])
            if request.given is None:
                texts.writelines(record.raw for record, key in zip(batch, split, strict=True) if key >= floor)
            done = Counts(documents=len(batch), bytes=int(sizes.sum()))
            counts.add(done)
            meter.add(done)
    work.write(f"survey/{piece:06d}.keys", np.concatenate(rows).astype("<u8").tobytes())
    return {"documents": counts.documents, "bytes": counts.bytes, "dropped": drops.to_json()}


def batches(request: Request, piece: int, meter: Meter, drops: Drops) -> Iterator[list[Record]]:
    """The documents of one piece in groups of about a mebibyte of text."""
    batch: list[Record] = []
    size = 0
    for part in request.pieces[piece]:
        for record in read_part(request.corpus, part, request.options.text_field, meter.read):
            if isinstance(record, Dropped):
                drops.add(record)
                meter.add(Counts(dropped=Counter([record.reason])))
                continue
            batch.append(record)
            size += len(record.raw)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out: those with a split key below ``threshold``, unless they have more than
    ``largest`` bytes (None: of any size)."""

    threshold: int
    largest: int | None = None

    def holds(self, split_keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """For documents with these keys (uint64) and sizes in bytes: bool ``[documents]``."""
        held = keys.below(split_keys, self.threshold)
        return held if self.largest is None else held & (sizes <= self.largest)


@dataclass(frozen=True)
class Survey:
    """What the survey of all pieces found: one table [documents, 2] of keys and sizes for each piece; ``floor``
    as :func:`sample_floor`; ``documents``, ``bytes`` and ``drops`` of all."""

    folder: Path
    tables: list[np.ndarray]
    floor: int
    documents: int
    bytes: int
    drops: Drops

    @classmethod
    def load(cls, request: Request, work: WorkFolder) -> Survey:
        """Read what :func:`survey_piece` wrote for every piece."""
        folder = work.path / "survey"
        numbers = range(len(request.pieces))
        tables = [np.fromfile(folder / f"{n:06d}.keys", dtype="<u8").reshape(-1, 2) for n in numbers]
        found = [work.read_json(f"survey/{n:06d}.json") for n in numbers]
        documents, size = (sum(tree[name] for tree in found) for name in ("documents", "bytes"))
        drops = Drops.merged(tree["dropped"] for tree in found)
        return cls(folder, tables, sample_floor(request), documents, size, drops)

    def held_out(self, fraction: float) -> HeldOut:
        """The share to hold out: the documents with the smallest keys, until they make ``fraction`` of the bytes.

        A document larger than twice these bytes is passed over and stays in training: it alone would make the
        validation set, of a size nobody asked for. Equal documents have equal keys and fall on the same side.
        Nothing is held out where all documents are larger than that, or where none would be left to train on.
        """
        table = np.concatenate(self.tables)
        wanted_bytes = fraction * float(table[:, 1].sum())
        largest = int(2 * wanted_bytes)
        small = table[table[:, 1] <= np.uint64(largest)]
        small = small[np.argsort(small[:, 0])]
        if fraction <= 0 or not len(small):
            return HeldOut(0)
        held = min(int(np.searchsorted(np.cumsum(small[:, 1]), wanted_bytes)), len(small) - 1)
        all_held = len(small) == len(table) and small[held, 0] == small[-1, 0]
        return HeldOut(0) if all_held else HeldOut(int(small[held, 0]) + 1, largest)

    def training_texts(self, held_out: HeldOut, progress: Callable[[int, int], None]) -> Iterator[str]:
        """Documents to train a tokenizer on: those with the largest split keys, ``TRAINING_BYTES`` of them, and
        none that is ``held_out``. ``progress(done, total)`` is told bytes."""
        entries: list[np.ndarray] = []  # key, piece, offset, size
        for piece, table in enumerate(self.tables):
            stored = table[table[:, 0] >= np.uint64(self.floor)]
            offsets = np.cumsum(stored[:, 1]) - stored[:, 1]
            entries.append(np.stack([stored[:, 0], np.full_like(offsets, piece), offsets, stored[:, 1]], axis=1))
        table = np.concatenate(entries)
        table = table[~held_out.holds(table[:, 0], table[:, 3])]
        table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))[::-1]]
        sizes = table[:, 3].astype(np.int64)
        table = table[np.cumsum(sizes) - sizes < TRAINING_BYTES]
        total, done = int(table[:, 3].sum()), 0
        for _, piece, offset, size in table.tolist():
            with open(self.folder / f"{piece:06d}.text", "rb", buffering=0) as stream:
                stream.seek(offset)
                yield stream.read(size).decode()
            done += size
            progress(done, total)
