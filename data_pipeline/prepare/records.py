"""Documents out of input files, each one judged: kept, or dropped for a reason that is counted."""

from __future__ import annotations

import codecs
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from data_pipeline.prepare.corpus import Corpus, InputFile
from data_pipeline.prepare.streams import Advance, chunks, damaged_input, lines, open_input

_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Part:
    """Work on one file: lines that start in bytes ``[start, stop)`` of an uncompressed JSONL file, row groups
    ``[start, stop)`` of a Parquet file; otherwise the whole file (0, -1). ``size`` is about the bytes of the
    file that it reads."""

    file: int
    start: int = 0
    stop: int = -1
    size: int = 0


@dataclass(frozen=True)
class Record:
    """One document: ``raw`` is its text in UTF-8, ``place`` its place in the file (byte offset of the line in
    the decompressed stream, row, or 0), ``span`` the bytes that it occupied there."""

    file: int
    place: int
    raw: bytes
    span: int

    @property
    def text(self) -> str:
        return self.raw.decode()


@dataclass(frozen=True)
class Dropped:
    """One document left out: ``path`` with the line or row, the ``reason`` by which it is counted, and
    ``detail`` about this one."""

    path: str
    reason: str
    detail: str = ""

    @property
    def why(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


Records = Generator[Record | Dropped, None, None]


def read_part(corpus: Corpus, part: Part, field: str, advance: Advance) -> Records:
    """The documents of ``part`` in order; ``field`` holds the text of a JSONL or Parquet record. One byte order mark
    at the very start of a text or JSONL file is no part of its text.

    A bad document is dropped. A bad file of many documents (unreadable, cut short, damaged) raises
    DamagedDataError, one that changed since it was listed ValueError.
    """
    file = corpus.files[part.file]
    if file.format == "text":
        return _read_text(corpus, part, file, advance)
    if file.format == "jsonl":
        return _read_jsonl(corpus, part, file, field, advance)
    return _read_parquet(corpus, part, file, field, advance)


def _read_text(corpus: Corpus, part: Part, file: InputFile, advance: Advance) -> Records:
    path = corpus.display(part.file)
    try:
        with open_input(file) as stream:
            raw = b"".join(chunks(file, stream, advance))
    except OSError as error:
        if file.remote:  # most likely the connection, and no reason to lose a document
            raise _unreadable(file, error) from error
        yield Dropped(path, "unreadable", error.strerror or str(error))
        return
    found = _judge(part.file, 0, path, raw, len(raw))
    if isinstance(found, Record) and raw.startswith(codecs.BOM_UTF8):
        text = raw[len(codecs.BOM_UTF8) :]
        found = replace(found, raw=text) if text else Dropped(path, "empty")
    yield found


def _judge(file: int, place: int, path: str, raw: bytes, span: int) -> Record | Dropped:
    if not raw:
        return Dropped(path, "empty")
    try:
        raw.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        return Dropped(path, "not UTF-8", f"byte {error.start} ({error.reason})")
    return Record(file, place, raw, span)


class _NotStandardError(ValueError):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _NotStandardError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_jsonl(corpus: Corpus, part: Part, file: InputFile, field: str, advance: Advance) -> Records:
    path = corpus.display(part.file)
    try:
        with open_input(file) as stream:
            if part.start:
                # The line that starts here or later: the byte before tells whether one starts right here.
                stream.seek(part.start - 1)
            numbered = enumerate(lines(chunks(file, stream, advance), max(part.start - 1, 0)), start=1)
            for number, (offset, line) in numbered:
                if part.start and number == 1:
                    continue
                if 0 <= part.stop <= offset:
                    return
                # Line numbers are known only where reading began at the top.
                where = f"{path}: byte {offset}" if part.start else f"{path}: line {number}"
                yield _parse_line(part.file, offset, where, line, field)
    except OSError as error:
        raise _unreadable(file, error) from error


def _parse_line(file: int, offset: int, where: str, line: bytes, field: str) -> Record | Dropped:
    span = len(line) + 1
    try:
        text = line.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        return Dropped(where, "not UTF-8", f"byte {error.start} of the line ({error.reason})")
    if offset == 0:
        text = text.removeprefix("\ufeff")  # the byte order mark of the file
    if not text.strip():
        return Dropped(where, "blank line")
    try:
        tree = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return Dropped(where, "not JSON", str(error))
    if not isinstance(tree, dict):
        return Dropped(where, "not a JSON object", type(tree).__name__)
    if field not in tree:
        return Dropped(where, "no text field", f"{field!r} is not among {', '.join(list(tree)[:8]) or 'no fields'}")
    value = tree[field]
    if not isinstance(value, str):
        return Dropped(where, "text is not a string", f"{field!r} is {type(value).__name__}")
    if not value:
        return Dropped(where, "empty")
    try:
        return Record(file, offset, value.encode("utf-8", "strict"), span)
    except UnicodeEncodeError as error:
        return Dropped(where, "not UTF-8", f"character {error.start} of the text is half a surrogate pair")


def _read_parquet(corpus: Corpus, part: Part, file: InputFile, field: str, advance: Advance) -> Records:
    path = corpus.display(part.file)
    try:
        with open_input(file) as stream:
            table = open_parquet(file, stream)
            groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
            first_row = sum(group.num_rows for group in groups[: part.start])
            for number in range(part.start, part.stop):
                row = first_row
                for value in _column(file, table, number, field):
                    yield _judge_value(part.file, row, f"{path}: row {row}", value, field)
                    row += 1
                expected = groups[number].num_rows
                if row - first_row != expected:
                    raise damaged_input(file, f"row group {number}", f"{row - first_row} of {expected} rows present")
                first_row = row
                advance(parquet_group_size(file, table.metadata, number))
    except OSError as error:
        raise _unreadable(file, error) from error


def open_parquet(file: InputFile, stream: Any) -> Any:
    """The ``pyarrow.parquet.ParquetFile`` on ``stream``; raises DamagedDataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged_input(file, "footer", f"not a whole Parquet file ({_first_line(error)})") from None


def check_parquet_column(file: InputFile, table: Any, field: str) -> None:
    """Raises ValueError when the file has no column ``field`` that holds text."""
    import pyarrow.types as kinds

    schema = table.schema_arrow
    if field not in schema.names:
        raise ValueError(
            f"{file.location}: has no column {field!r}; it has {', '.join(schema.names)}. "
            "What to do: name the column of the text with --text-field."
        )
    kind = schema.field(field).type
    value = kind.value_type if kinds.is_dictionary(kind) else kind
    if not any(is_kind(value) for is_kind in (kinds.is_string, kinds.is_large_string, kinds.is_string_view)):
        raise ValueError(
            f"{file.location}: column {field!r} is {kind}, expected strings. "
            "What to do: name the column of the text with --text-field."
        )


def parquet_group_size(file: InputFile, metadata: Any, number: int) -> int:
    """The share of the file's bytes that row group ``number`` stands for, in progress and in cutting work."""
    sizes = [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]
    return max(file.size, 0) * sizes[number] // max(sum(sizes), 1)


def _column(file: InputFile, table: Any, group: int, field: str) -> Iterator[bytes | None]:
    """Values of one row group as bytes: Arrow does not check UTF-8 when it reads, so we must."""
    import pyarrow

    binary = pyarrow.large_binary()
    try:
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group], columns=[field]):
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            yield from column.cast(binary).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged_input(file, f"row group {group}", f"cannot be read ({_first_line(error)})") from None


def _judge_value(file: int, row: int, where: str, value: bytes | None, field: str) -> Record | Dropped:
    if value is None:
        return Dropped(where, "text is not a string", f"{field!r} is null")
    return _judge(file, row, where, value, len(value))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _unreadable(file: InputFile, error: OSError) -> Exception:
    return damaged_input(file, "unreadable", error.strerror or str(error))
