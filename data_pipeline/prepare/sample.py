"""A sample of documents from all over the input, to estimate sizes and to compare tokenisers on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from itertools import islice

from data_pipeline.prepare.corpus import Corpus, InputFile
from data_pipeline.prepare.records import Part, Record, open_parquet, parquet_group_size, read_part
from data_pipeline.prepare.streams import CHUNK, chunks, network_errors, open_input

_DOCUMENTS, _BYTES, _SHARE = 512, 1 << 20, 16
_SMALLEST_BUDGET, _SHORTEST_CUT = 1 << 16, 1 << 11
_REMOTE_PLACES, _COMPRESSED_FILES = 64, 8


@dataclass(frozen=True)
class Sample:
    """Some documents in UTF-8, long ones cut, and the ``density``: bytes of text for each byte of input."""

    documents: list[bytes]
    density: float


def sample_documents(corpus: Corpus, field: str) -> Sample:
    """Documents from evenly spaced places of the input (each the first few from there on): a MiB, or a 16th of
    a smaller input. Depends on the input alone."""
    parts = _places(corpus)
    each = -(-_DOCUMENTS // len(parts))
    budget = min(_BYTES, max(corpus.size // _SHARE, _SMALLEST_BUDGET)) // len(parts)
    documents: list[bytes] = []
    text = span = 0
    for part in parts:
        taken = 0
        records = read_part(corpus, part, field, lambda num_bytes: None)
        with network_errors([corpus.files[part.file]]), contextlib.closing(records):
            for record in islice(records, 4 * each):  # a run of bad ones must not make it read on for long
                if isinstance(record, Record):
                    text, span = text + len(record.raw), span + record.span
                    documents.append(cut_text(record.raw, max(budget, _SHORTEST_CUT)))
                    taken += len(documents[-1])
                if taken >= budget:
                    break
    packed = [corpus.files[part.file] for part in parts if corpus.files[part.file].compression]
    return Sample(documents, (text / span if span else 1.0) * _expansion(packed[:_COMPRESSED_FILES]))


def _places(corpus: Corpus) -> list[Part]:
    """Where to read: places at equal distances in bytes, so that a large file has more of them."""
    remote = any(file.remote for file in corpus.files)
    count = _REMOTE_PLACES if remote else _DOCUMENTS
    ends: list[int] = []
    for file in corpus.files:
        ends.append((ends[-1] if ends else 0) + max(file.size, 1))
    parts: dict[tuple[int, int], Part] = {}
    index = 0
    for number in range(count):
        place = ends[-1] * number // count
        while place >= ends[index]:
            index += 1
        offset = place - (ends[index] - max(corpus.files[index].size, 1))
        start, stop = _part_at(corpus.files[index], offset)
        parts[index, start] = Part(index, start, stop)
    return list(parts.values())


def _part_at(file: InputFile, offset: int) -> tuple[int, int]:
    if file.divisible:
        return offset, -1
    if file.format != "parquet":
        return 0, -1
    with open_input(file) as stream:
        metadata = open_parquet(file, stream).metadata
    for number in range(metadata.num_row_groups):
        offset -= parquet_group_size(file, metadata, number)
        if offset < 0:
            return number, number + 1
    return max(metadata.num_row_groups - 1, 0), metadata.num_row_groups


def _expansion(files: list[InputFile]) -> float:
    """Bytes out of bytes in, at the start of compressed ``files``; 1 when there are none."""
    packed = unpacked = 0

    def advance(num_bytes: int) -> None:
        nonlocal packed
        packed += num_bytes

    for number, file in enumerate(files, start=1):
        with open_input(file) as stream:
            for piece in chunks(file, stream, advance):
                unpacked += len(piece)
                if packed >= number * CHUNK:
                    break
    return unpacked / packed if packed else 1.0


def cut_text(raw: bytes, longest: int) -> bytes:
    """The first ``longest`` bytes of a text, up to a whole character."""
    return raw if len(raw) <= longest else raw[:longest].decode(errors="ignore").encode()
