"""What one preparation was asked to do, cut into pieces of work: frozen before anything is read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from data_pipeline.prepare.corpus import Corpus, InputFile
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.records import Part, check_parquet_column, open_parquet, parquet_group_size
from data_pipeline.prepare.streams import open_input
from data_pipeline.prepare.tokenizer import TokenizerFile
from data_pipeline.store.manifest import digest_of

REQUEST_NAME = "request.json"
_SMALLEST_PIECE, _USUAL_PIECE, _LARGEST_PIECE = 1 << 20, 1 << 24, 1 << 30
_THREADS = 16


@dataclass(frozen=True)
class Request:
    """The input files, the options that decide the result (``choices``), and the pieces of work.

    ``given`` is the tokenizer to use, or None to train one. ``backend`` is the tokeniser asked for.
    ``appends_to`` is the fingerprint of the dataset to extend.
    """

    corpus: Corpus
    options: PrepareOptions
    given: TokenizerFile | None
    backend: str
    pieces: list[list[Part]]
    appends_to: str | None = None

    @property
    def choices(self) -> dict[str, Any]:
        """What the user chose, as the manifest records it."""
        return self.options.choices(self.given)

    @cached_property
    def digest(self) -> str:
        """Tells one input and its options from another; does not depend on the pieces."""
        return digest_of([[_identity(file) for file in self.corpus.files], self.choices])

    @property
    def work_choices(self) -> dict[str, Any]:
        """What unfinished work must have in common with this request to be taken up."""
        return {**self.choices, "tokenizer_backend": self.backend, "appends_to": self.appends_to}

    def piece_identity(self, number: int) -> list[Any]:
        """What piece ``number`` reads: equal for equal content at the same place."""
        return [[_identity(self.corpus.files[part.file]), part.start, part.stop] for part in self.pieces[number]]

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "work_choices": self.work_choices,
            "backend": self.backend,
            "appends_to": self.appends_to,
            "options": asdict(self.options),
            "given": None if self.given is None else asdict(self.given),
            "corpus": self.corpus.to_json(),
            "pieces": [[[part.file, part.start, part.stop, part.size] for part in piece] for piece in self.pieces],
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Request:
        return cls(
            corpus=Corpus.from_json(tree["corpus"]),
            options=PrepareOptions(**tree["options"]),
            given=None if tree["given"] is None else TokenizerFile(**tree["given"]),
            backend=tree["backend"],
            pieces=[[Part(*part) for part in piece] for piece in tree["pieces"]],
            appends_to=tree["appends_to"],
        )

    def piece_files(self, number: int) -> list[InputFile]:
        """The files of piece ``number``."""
        return [self.corpus.files[part.file] for part in self.pieces[number]]

    def piece_size(self, number: int) -> int:
        """About how many bytes of input piece ``number`` reads."""
        return sum(part.size for part in self.pieces[number])


def _identity(file: InputFile) -> list[Any]:
    return [file.source, file.name, file.size, file.version, file.format, file.compression]


def cut_pieces(corpus: Corpus, field: str, piece_bytes: int | None = None) -> list[list[Part]]:
    """Pieces of about ``piece_bytes`` of input (None: by its size).

    Files are joined in order; uncompressed JSONL is cut into ranges of bytes and Parquet by row groups; other
    files are not cut. Raises DamagedDataError for a Parquet file without a footer, ValueError for one without
    a column of text.
    """
    size = piece_bytes or _choose_piece_bytes(corpus.size)
    pieces: list[list[Part]] = []
    filled = size
    with ThreadPoolExecutor(_THREADS) as pool:
        for parts in pool.map(lambda i: _cut_file(corpus.files[i], i, field, size), range(len(corpus.files))):
            for part in parts:
                if filled >= size:
                    pieces.append([])
                    filled = 0
                pieces[-1].append(part)
                filled += max(part.size, 1)
    return pieces


def _choose_piece_bytes(size: int) -> int:
    """Enough pieces to share between workers, large enough for few and large spills: 1/64 of a small input
    (at least 1 MiB), 16 MiB of a larger one, 1/512 of a very large one (at most 1 GiB)."""
    return max(_SMALLEST_PIECE, min(size // 64, _USUAL_PIECE), min(size // 512, _LARGEST_PIECE))


def _cut_file(file: InputFile, index: int, field: str, size: int) -> list[Part]:
    if file.divisible and file.size > size:
        stops = [*range(size, file.size, size), file.size]
        return [Part(index, start, stop, stop - start) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
    if file.format == "parquet":
        return _cut_parquet(file, index, field, size)
    return [Part(index, size=max(file.size, 0))]


def _cut_parquet(file: InputFile, index: int, field: str, size: int) -> list[Part]:
    with open_input(file) as stream:
        table = open_parquet(file, stream)
        check_parquet_column(file, table, field)
        weights = [parquet_group_size(file, table.metadata, n) for n in range(table.metadata.num_row_groups)]
    parts: list[Part] = []
    start = weight = 0
    for number, group in enumerate(weights, start=1):
        weight += group
        if weight >= size or number == len(weights):
            parts.append(Part(index, start, number, weight))
            start, weight = number, 0
    return parts
