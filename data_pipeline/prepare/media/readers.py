"""Raw samples out of pieces of input: the bytes of their parts, by extension, nothing decoded yet."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from data_pipeline.errors import DamagedDataError
from data_pipeline.media.captions import caption_in
from data_pipeline.prepare import remote
from data_pipeline.prepare.media.inputs import FILES, LINES, TAR, Piece, image_named
from data_pipeline.prepare.media.options import MediaOptions
from data_pipeline.store import tar
from data_pipeline.store.grouping import is_metadata, split_name

IMAGE, LATENT, CONDITIONING, CAPTION, RECORD = "image", "lat.npy", "cond.npy", "txt", "json"
_IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"))
_ROWS = 64


class RejectError(ValueError):
    """A sample that cannot be taken: ``reason`` is what it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass
class RawSample:
    """Parts of one sample by extension; images of whatever format are under ``image``. ``source`` says where it comes
    from. ``problem`` when it cannot be read."""

    source: str
    parts: dict[str, bytes] = field(default_factory=dict)
    problem: RejectError | None = None


def read_piece(piece: Piece, options: MediaOptions) -> Iterator[RawSample]:
    """The raw samples of a piece, in order.

    Raises DamagedDataError for a tar or Parquet file that is damaged, whatever it still holds.
    """
    if piece.form == FILES:
        for stem, files in piece.samples:
            yield _from_files(piece, stem, files, options)
    elif piece.form == LINES:
        yield from _from_lines(piece, options)
    elif piece.form == TAR:
        yield from _from_tar(piece, options)
    else:
        yield from _from_parquet(piece, options)


def read_file(root: str, name: str, max_bytes: int) -> bytes:
    """A regular file below ``root``. Raises RejectError for paths that leave it, links, and files that are too large
    or not there."""
    if os.path.isabs(name) or "\\" in name or ".." in name.split("/") or "\0" in name:
        raise RejectError("unsafe path", f"{name!r} leaves the folder")
    path = os.path.join(root, name)
    if os.path.realpath(path) != os.path.join(os.path.realpath(root), os.path.normpath(name)):
        raise RejectError("link", f"{name!r} is reached through a link")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise RejectError("unreadable", f"{name}: {error.strerror or error}") from None
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RejectError("unreadable", f"{name} is not a regular file")
        if status.st_size > max_bytes:
            raise RejectError("too large", f"{name}: {status.st_size} bytes, more than the {max_bytes} allowed")
        return stream.read()


def _from_files(piece: Piece, stem: str, files: dict[str, str], options: MediaOptions) -> RawSample:
    sample = RawSample(piece.name + stem)
    try:
        for extension, name in files.items():
            _put(sample, extension, read_file(piece.location, name, options.max_bytes))
    except RejectError as error:
        sample.problem = error
    return sample


def _put(sample: RawSample, extension: str, payload: bytes) -> None:
    if extension in _IMAGE_EXTENSIONS:
        if IMAGE in sample.parts:
            raise RejectError("several images", "one stem or key has more than one image")
        extension = IMAGE
    elif extension == "npy":
        extension = LATENT
    sample.parts[extension] = payload


def _from_lines(piece: Piece, options: MediaOptions) -> Iterator[RawSample]:
    with open(piece.location, "rb") as stream:
        stream.seek(piece.start)
        for number in range(piece.number, piece.number + piece.count):
            line = stream.readline()
            if not line:
                return
            if not line.strip():
                continue
            sample = RawSample(f"{piece.name}:{number}", {RECORD: line.strip()})
            if options.kind == "images":
                _add_listed_image(sample, line, os.path.dirname(piece.location), options)
            yield sample


def _add_listed_image(sample: RawSample, line: bytes, folder: str, options: MediaOptions) -> None:
    del sample.parts[RECORD]
    try:
        name = image_named(line)
        if name is None:
            raise RejectError("no image named", "expected a JSON object with file_name, image, path or file")
        caption = caption_in(json.loads(line))
        if caption is not None:
            sample.parts[CAPTION] = caption.encode("utf-8", "surrogatepass")
        sample.parts[IMAGE] = read_file(folder, name, options.max_bytes)
    except RejectError as error:
        sample.problem = error


def _from_tar(piece: Piece, options: MediaOptions) -> Iterator[RawSample]:
    with _open(piece.location) as stream:
        sample: RawSample | None = None
        key = ""
        seen: set[str] = set()
        for member in tar.walk(stream, piece.location, foreign=True):
            split = split_name(member.name)
            if split is None or is_metadata(member.name):
                continue
            if sample is None or split[0] != key:
                if sample is not None:
                    yield sample
                key = split[0]
                sample = RawSample(f"{piece.name}:{key}")
                if key in seen:
                    sample.problem = RejectError("repeated key", "members of one key must follow each other")
                seen.add(key)
            try:
                if member.length > options.max_bytes:
                    detail = f"{member.name}: {member.length} bytes, more than the {options.max_bytes} allowed"
                    raise RejectError("too large", detail)
                stream.seek(member.offset)
                payload = stream.read(member.length)
                if split[1] in sample.parts:
                    raise RejectError("repeated member", member.name)
                # Numbered members are parts of a document; their number is their place.
                if options.kind == "interleaved":
                    sample.parts[split[1]] = payload
                else:
                    _put(sample, split[1], payload)
            except RejectError as error:
                sample.problem = error
        if sample is not None:
            yield sample


def tar_members(piece: Piece, max_bytes: int, extensions: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """(name, payload) of the members with one of ``extensions``. Raises DamagedDataError."""
    with _open(piece.location) as stream:
        for member in tar.walk(stream, piece.location, foreign=True):
            split = split_name(member.name)
            if split is None or split[1] not in extensions or is_metadata(member.name) or member.length > max_bytes:
                continue
            stream.seek(member.offset)
            yield member.name, stream.read(member.length)


def _open(location: str) -> BinaryIO:
    return remote.open_url(location, seekable=True) if remote.is_url(location) else open(location, "rb")


def _from_parquet(piece: Piece, options: MediaOptions) -> Iterator[RawSample]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(piece.location) as stream:
            table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            columns = _columns(piece, table.schema_arrow.names, options)
            row = piece.start
            batches = table.iter_batches(batch_size=_ROWS, row_groups=[piece.number], columns=list(columns.values()))
            for batch in batches:
                for values in batch.to_pylist():
                    yield _from_row(f"{piece.name}:{row}", values, columns)
                    row += 1
    except pyarrow.ArrowException as error:
        problem = str(error).splitlines()[0]
        raise DamagedDataError(
            f"{piece.location}: row group {piece.number} cannot be read ({problem}). "
            "What to do: restore the file from a copy, or take it out of the source.",
            shard=piece.location,
        ) from None


def _columns(piece: Piece, present: list[str], options: MediaOptions) -> dict[str, str]:
    """Part -> column. Raises ValueError when the main column is not there."""
    main, column = (IMAGE, options.image_column) if options.kind == "images" else (LATENT, options.latent_column)
    if column not in present:
        flag = "--image-column" if options.kind == "images" else "--latent-column"
        raise ValueError(
            f"{piece.location}: has no column {column!r}; it has {', '.join(present)}. What to do: name it with {flag}."
        )
    columns = {main: column}
    caption = options.caption_column
    if caption not in present and caption == "caption" and "text" in present:
        caption = "text"
    if caption in present:
        columns[CAPTION] = caption
    if options.kind == "latents":
        if options.conditioning_column in present:
            columns[CONDITIONING] = options.conditioning_column
        if options.label_column in present:
            columns[RECORD] = options.label_column
    return columns


def _from_row(source: str, values: dict[str, Any], columns: dict[str, str]) -> RawSample:
    sample = RawSample(source)
    for part, column in columns.items():
        value = values[column]
        if isinstance(value, dict):  # how Hugging Face stores an image: its bytes and its name
            value = value.get("bytes")
        if value is None:
            continue
        if part == CAPTION and isinstance(value, str):
            value = value.encode("utf-8", "surrogatepass")
        elif part == RECORD and isinstance(value, int):
            value = json.dumps({"label": value}).encode()
        if isinstance(value, bytes):
            sample.parts[part] = value
        else:
            sample.problem = RejectError("wrong column type", f"column {column!r} holds {type(value).__name__}")
    return sample
