"""What media a source holds: folders of files, WebDataset tars, Parquet and JSONL files, listed in a fixed order and
cut into pieces of work."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.prepare import remote

LINES, FILES, TAR, PARQUET = "lines", "files", "tar", "parquet"
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
_TAR_SUFFIXES, _PARQUET_SUFFIXES, _LINES_SUFFIXES = (".tar",), (".parquet", ".pq"), (".jsonl", ".ndjson")
# Extensions that make up a sample, by kind; the longest that fits counts. ``img.v2.jpg`` has the stem ``img.v2``.
_PARTS = {
    "images": ("jpg", "jpeg", "png", "webp", "txt", "json"),
    "latents": ("lat.npy", "cond.npy", "npy", "txt", "json"),
    "interleaved": (),
}
_PIECE_BYTES, _PIECE_SAMPLES, _PIECE_LINES = 1 << 26, 1024, 256
_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class Piece:
    """One unit of work: ``name`` is what its samples are called after, ``location`` a path or URL.

    ``files``: ``samples`` are (stem, {extension: path below ``location``}). ``lines``: ``count`` lines from byte
    ``start`` on, the first being line ``number``; media lie beside the file. ``tar``: the whole archive. ``parquet``:
    row group ``number``, whose first row is ``start``. ``size`` is about the bytes it reads.
    """

    form: str
    name: str
    location: str
    size: int
    version: str = ""
    start: int = 0
    count: int = 0
    number: int = 0
    samples: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Piece:
        """From :meth:`to_json`."""
        tree["samples"] = [(stem, files) for stem, files in tree["samples"]]
        return cls(**tree)


@dataclass
class Listing:
    """All pieces, and files that no sample can be made of, each with the reason."""

    pieces: list[Piece] = field(default_factory=list)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)


def list_media(sources: Sequence[str | os.PathLike[str]], kind: str, exclude: Path | None = None) -> Listing:
    """The pieces of ``sources``, each a folder, a file, a glob or an fsspec URL of tars or Parquet files.

    ``exclude`` is a folder that is left out (the output, when it lies inside a source).
    Raises ValueError for a source that does not exist, is of no known form, or holds nothing.
    """
    listing = Listing()
    for number, given in enumerate(sources):
        source = str(os.fspath(given))
        prefix = f"{number}:" if len(sources) > 1 else ""
        before = len(listing.pieces)
        if remote.is_url(source):
            for found in remote.list_files(source, "**/*"):
                _add_file(listing, prefix + found.name, found.location, max(found.size, 0), found.version, kind)
        elif os.path.isdir(source):
            _add_folder(listing, prefix, Path(source), kind, exclude)
        else:
            _add_paths(listing, prefix, source, kind)
        if len(listing.pieces) == before:
            raise ValueError(f"{source} holds no {kind}. What to do: {_expected(kind)}.")
    return listing


def _expected(kind: str) -> str:
    if kind == "interleaved":
        return "name a .jsonl file of documents, or WebDataset tars of .json with numbered media"
    what = "images with captions beside them" if kind == "images" else ".npy latents with conditioning beside them"
    return f"name a folder of {what}, WebDataset tars, or Parquet files"


def _add_paths(listing: Listing, prefix: str, source: str, kind: str) -> None:
    is_glob = bool(set(source) & _MAGIC) and not os.path.exists(source)
    paths = sorted(glob.glob(source, recursive=True)) if is_glob else [source]
    for path in paths:
        if os.path.isdir(path):
            continue
        try:
            status = os.stat(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"source {path}: {reason}. What to do: name an existing folder or file.") from None
        _add_file(listing, prefix + os.path.basename(path), path, status.st_size, str(status.st_mtime_ns), kind)


def _add_file(listing: Listing, name: str, location: str, size: int, version: str, kind: str) -> None:
    lower = name.lower()
    if lower.endswith(_TAR_SUFFIXES):
        listing.pieces.append(Piece(TAR, name, location, size, version))
    elif lower.endswith(_PARQUET_SUFFIXES) and kind != "interleaved":
        listing.pieces.extend(_parquet_pieces(name, location, size, version))
    elif lower.endswith(_LINES_SUFFIXES) and kind != "latents" and not remote.is_url(location):
        listing.pieces.extend(_line_pieces(name, location, version))
    else:
        listing.left_out.append((name, "unknown kind of file", ""))


def _add_folder(listing: Listing, prefix: str, root: Path, kind: str, exclude: Path | None) -> None:
    excluded = os.path.realpath(exclude) if exclude is not None else None
    stems: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    versions: list[str] = []
    captioned: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) != excluded
        )
        for linked in [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            listing.left_out.append((prefix + _relative(root, folder, linked), "link", "links are not followed"))
            folders.remove(linked)
        for name in sorted(names):
            if name.startswith("."):
                continue
            relative, path = _relative(root, folder, name), os.path.join(folder, name)
            if os.path.islink(path) or not os.path.isfile(path):
                listing.left_out.append((prefix + relative, "link", "not a regular file; links are not followed"))
                continue
            status = os.stat(path)
            version = str(status.st_mtime_ns)
            part = _part(name, kind)
            if kind == "images" and name in CAPTION_FILES:
                captioned.append(relative)
                _add_file(listing, prefix + relative, path, status.st_size, version, kind)
            elif part is None:
                _add_file(listing, prefix + relative, path, status.st_size, version, kind)
            else:
                stem = relative[: -len(part) - 1]
                stems.setdefault(stem, {})[part] = relative
                sizes[stem] = sizes.get(stem, 0) + status.st_size
                versions.append(f"{status.st_size}:{version}")
    listed = _listed_images(root, captioned)
    if listed:
        stems = {stem: files for stem, files in stems.items() if not listed.intersection(files.values())}
    listing.pieces.extend(_file_pieces(prefix, root, stems, sizes))


def _relative(root: Path, folder: str, name: str) -> str:
    return os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _part(name: str, kind: str) -> str | None:
    lower = name.lower()
    fitting = [part for part in _PARTS[kind] if lower.endswith("." + part) and len(lower) > len(part) + 1]
    return max(fitting, key=len) if fitting else None


def _listed_images(root: Path, captioned: Sequence[str]) -> set[str]:
    """Paths below ``root`` of the images that caption files name."""
    found = set()
    for name in captioned:
        folder = os.path.dirname(name)
        with open(root / name, "rb") as stream:
            for line in stream:
                image = image_named(line)
                if image is not None:
                    found.add(os.path.normpath(os.path.join(folder, image)).replace(os.sep, "/"))
    return found


def image_named(line: bytes) -> str | None:
    """The image that a line of a caption file is about; None where it names none."""
    try:
        tree = json.loads(line)
    except ValueError:
        return None
    if isinstance(tree, dict):
        for key in ("file_name", "image", "path", "file"):
            if isinstance(tree.get(key), str):
                return str(tree[key])
    return None


def _file_pieces(prefix: str, root: Path, stems: dict[str, dict[str, str]], sizes: dict[str, int]) -> Iterator[Piece]:
    group: list[tuple[str, dict[str, str]]] = []
    size = 0
    ordered = sorted(stems.items())
    for at, (stem, files) in enumerate(ordered):
        group.append((stem, files))
        size += sizes[stem]
        if size >= _PIECE_BYTES or len(group) >= _PIECE_SAMPLES or at + 1 == len(ordered):
            yield Piece(FILES, prefix, str(root), size, str(size), samples=group)
            group, size = [], 0


def _line_pieces(name: str, location: str, version: str) -> Iterator[Piece]:
    """Lines in groups; blank ones count, so that line numbers are those of the file."""
    start = position = 0
    first = 1
    with open(location, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            position += len(line)
            if number - first + 1 == _PIECE_LINES:
                yield Piece(LINES, name, location, position - start, version, start, _PIECE_LINES, first)
                start, first = position, number + 1
    if position > start:
        yield Piece(LINES, name, location, position - start, version, start, _PIECE_LINES, first)


def _parquet_pieces(name: str, location: str, size: int, version: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with remote.open_url(location, seekable=True) if remote.is_url(location) else open(location, "rb") as stream:
            metadata = pyarrow.parquet.ParquetFile(stream).metadata
    except (pyarrow.ArrowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise ValueError(
            f"{location}: not a whole Parquet file ({problem}). What to do: replace or remove it."
        ) from None
    row = 0
    for number in range(metadata.num_row_groups):
        rows = metadata.row_group(number).num_rows
        yield Piece(PARQUET, name, location, size // metadata.num_row_groups, version, row, rows, number)
        row += rows
