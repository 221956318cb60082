"""Which files a text corpus holds: listed once, in a fixed order, before anything is read."""

from __future__ import annotations

import glob
import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.prepare import remote

FORMATS = ("auto", "text", "jsonl", "parquet")
HASHED_BYTES = 1 << 30
"""Local inputs up to this size in all are known by their content; larger ones by size and time of change."""

_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_BY_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus.

    ``name`` is its path relative to source number ``source``; ``location`` a local path or a URL; ``size`` in
    bytes, -1 where a server does not say. ``version`` tells one content from another. ``format`` is ``text``
    (one document), ``jsonl`` or ``parquet``; ``compression`` is ``""``, ``gz`` or ``zst``. One that is not
    ``seekable`` can only be read from the start.
    """

    source: int
    name: str
    location: str
    size: int
    version: str
    format: str
    compression: str
    changed_ns: int = 0
    seekable: bool = True

    @property
    def remote(self) -> bool:
        """Whether it lies behind a URL."""
        return remote.is_url(self.location)

    @property
    def divisible(self) -> bool:
        """Whether reading may begin at any line."""
        return self.format == "jsonl" and not self.compression and self.seekable and self.size >= 0


@dataclass(frozen=True)
class Corpus:
    """Files of one corpus in a fixed order; ``name`` and ``root`` are for people."""

    name: str
    root: str
    files: list[InputFile]

    @property
    def size(self) -> int:
        """Bytes of all files, as far as known."""
        return sum(max(file.size, 0) for file in self.files)

    def display(self, index: int) -> str:
        """How messages name file ``index``: relative to its source where there is only one."""
        file = self.files[index]
        return file.name if self.files[-1].source == 0 else file.location

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Corpus:
        return cls(tree["name"], tree["root"], [InputFile(**file) for file in tree["files"]])


def text_corpus(
    sources: Sequence[str | os.PathLike[str]],
    pattern: str = "**/*",
    file_format: str = "auto",
    exclude: Path | None = None,
) -> Corpus:
    """The files of ``sources``: folders (regular files that match ``pattern``, none with a name that starts
    with a dot on the way), files, globs, or fsspec URLs of the same.

    ``exclude`` is a local folder whose files are left out (the output, when it lies inside a source). A file
    reached through two sources is taken once.

    Raises ValueError for a source that is missing or matches nothing, and for an unknown ``file_format``.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format {file_format!r} is unknown; expected one of {', '.join(FORMATS)}")
    if not sources:
        raise ValueError("no source given. What to do: name a folder, a file, a glob or a URL.")
    files: list[InputFile] = []
    seen: set[str] = set()
    for number, source in enumerate(os.fspath(s) for s in sources):
        listing = remote.list_files(source, pattern) if remote.is_url(source) else _list_local(source, pattern, exclude)
        for found in listing:
            if found.location not in seen:
                seen.add(found.location)
                files.append(_input_file(number, found, file_format))
    names = [_name(os.fspath(source)) for source in sources]
    roots = [os.fspath(s) if remote.is_url(os.fspath(s)) else os.path.abspath(s) for s in sources]
    return _with_content_versions(Corpus(" ".join(names), " ".join(roots), files))


def stdlib_corpus() -> Corpus:
    """Source files of the standard library of the interpreter in use, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        relative = Path(folder).relative_to(root)
        names.extend((relative / name).as_posix() for name in files if name.endswith(".py"))
    if not names:
        raise ValueError(
            f"the standard library in {root} has no source files. "
            "What to do: use an interpreter installed with sources, or prepare a folder of your own."
        )
    version = ".".join(map(str, sys.version_info[:3]))
    listing = [_stat(name, root / name) for name in sorted(names)]
    entries = [_input_file(0, found, "text") for found in listing]
    return _with_content_versions(Corpus(f"python {version} standard library", str(root.resolve()), entries))


def check_unchanged(file: InputFile) -> None:
    """Raises ValueError when a local file is no longer what was listed. What cannot be opened is left to the
    reader."""
    if file.remote or file.version == "unreadable":
        return
    try:
        status = os.stat(file.location)
    except OSError as error:
        raise ValueError(f"{file.location} changed while it was being prepared: {error}. {_AGAIN}") from None
    if status.st_size == file.size and status.st_mtime_ns == file.changed_ns:
        return
    if status.st_size == file.size and file.version == _content_version(file.location):
        return
    raise ValueError(f"{file.location} changed while it was being prepared. {_AGAIN}")


_AGAIN = "What to do: run prepare again with --force, which starts anew from the files as they are."


def _name(source: str) -> str:
    return source if remote.is_url(source) or _has_magic(source) else Path(source).resolve().name


def _has_magic(path: str) -> bool:
    return bool(_MAGIC & set(path)) and not os.path.exists(path)


def _list_local(source: str, pattern: str, exclude: Path | None) -> list[remote.Found]:
    path = Path(source)
    excluded = exclude.resolve() if exclude is not None else None

    def wanted(candidate: Path) -> bool:
        # Path.resolve raises RuntimeError for links in a circle; such a file is kept, to be reported as unreadable.
        return excluded is None or not Path(os.path.realpath(candidate)).is_relative_to(excluded)

    if path.is_dir():
        return _list_folder(path, pattern, wanted)
    if path.is_file():
        return [_stat(path.name, path)]
    if _has_magic(source):
        fixed = Path(*_fixed_parts(path))
        matches = sorted(m for m in map(Path, glob.glob(source, recursive=True)) if m.is_file() and wanted(m))
        if not matches:
            raise ValueError(f"no file matches {source}. What to do: check the glob (** goes through subfolders).")
        return [_stat(match.relative_to(fixed).as_posix(), match) for match in matches]
    raise ValueError(f"source {source} does not exist. What to do: name an existing folder, file, glob or URL.")


def _fixed_parts(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        if _MAGIC & set(part):
            break
        parts.append(part)
    return parts


def _list_folder(root: Path, pattern: str, wanted: Callable[[Path], bool]) -> list[remote.Found]:
    names = []
    for path in root.glob(pattern):
        relative = path.relative_to(root)
        dangling = path.is_symlink() and not path.exists()  # kept, to be reported as unreadable
        if any(part.startswith(".") for part in relative.parts) or not (path.is_file() or dangling):
            continue
        if wanted(path):
            names.append(relative.as_posix())
    if not names:
        raise ValueError(
            f"folder {root} has no file that matches {pattern!r}. "
            f"What to do: check the folder, or give another --pattern (such as '**/*.txt')."
        )
    return [_stat(name, root / name) for name in sorted(names)]


def _stat(name: str, path: Path) -> remote.Found:
    location = os.path.abspath(path)
    try:
        status = os.stat(path)
    except OSError:
        return remote.Found(name, location, 0, "unreadable")
    return remote.Found(name, location, status.st_size, f"changed:{status.st_mtime_ns}", status.st_mtime_ns)


def _input_file(source: int, found: remote.Found, file_format: str) -> InputFile:
    stem, suffix = os.path.splitext(found.name.lower())
    compression = _COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    detected = _BY_SUFFIX.get(suffix, "text") if file_format == "auto" else file_format
    if detected == "parquet" and compression:
        raise ValueError(f"{found.location}: a compressed Parquet file cannot be read. What to do: unpack it first.")
    if detected == "parquet" and not found.seekable:
        raise ValueError(
            f"{found.location}: its server does not send parts of files, which Parquet needs. "
            "What to do: download it first."
        )
    return InputFile(
        source, found.name, found.location, found.size, found.version, detected, compression, found.ns, found.seekable
    )


def _with_content_versions(corpus: Corpus) -> Corpus:
    """Small local inputs get versions that survive a copy or a fresh checkout."""
    if corpus.size > HASHED_BYTES or any(file.remote for file in corpus.files):
        return corpus

    def hashed(file: InputFile) -> InputFile:
        try:
            return replace(file, version=_content_version(file.location))
        except OSError:
            return replace(file, version="unreadable")

    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        return replace(corpus, files=list(pool.map(hashed, corpus.files)))


def _content_version(location: str) -> str:
    state = xxhash.xxh3_128()
    with open(location, "rb") as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return f"xxh3:{state.hexdigest()}"
