"""Which files a text corpus holds, and what each is worth: scanned once, before anything is written."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Files of one corpus: ``files`` are paths relative to ``root``, sorted; ``name`` is for people."""

    name: str
    root: Path
    files: list[str]


@dataclass(frozen=True)
class Document:
    """One usable file: ``size`` in bytes of UTF-8, ``digest`` the xxh3-128 of its bytes."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Skipped:
    """One file left out, and why: ``empty``, ``not UTF-8 ...`` or ``unreadable ...``."""

    path: str
    why: str


def folder_corpus(source: str | os.PathLike[str], pattern: str, exclude: Path | None = None) -> Corpus:
    """Regular files below ``source`` that match the glob ``pattern``; names starting with a dot are passed
    over.

    ``exclude`` is a folder whose files are left out (the output, when it lies inside the source).
    Raises ValueError when the folder is missing or nothing matches.
    """
    root = Path(source)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"corpus folder {root} {found}. What to do: name an existing folder of text files.")
    excluded = exclude.resolve() if exclude is not None else None
    files = []
    for path in root.glob(pattern):
        relative = path.relative_to(root)
        dangling = path.is_symlink() and not path.exists()  # kept, to be reported as unreadable
        if any(part.startswith(".") for part in relative.parts) or not (path.is_file() or dangling):
            continue
        if excluded is not None and path.resolve().is_relative_to(excluded):
            continue
        files.append(relative.as_posix())
    if not files:
        raise ValueError(
            f"corpus folder {root} has no file that matches {pattern!r}. "
            f"What to do: check the folder, or give another --pattern (such as '**/*.txt')."
        )
    return Corpus(root.resolve().name, root, sorted(files))


def stdlib_corpus() -> Corpus:
    """Source files of the standard library of the interpreter in use, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        relative = Path(folder).relative_to(root)
        files.extend((relative / name).as_posix() for name in names if name.endswith(".py"))
    if not files:
        raise ValueError(
            f"the standard library in {root} has no source files. "
            "What to do: use an interpreter installed with sources, or prepare a folder of your own."
        )
    version = ".".join(map(str, sys.version_info[:3]))
    return Corpus(f"python {version} standard library", root, sorted(files))


def content_digest(raw: bytes) -> str:
    """xxh3-128 of a document's bytes, in hex."""
    return str(xxhash.xxh3_128_hexdigest(raw))


def scan(corpus: Corpus, threads: int) -> Iterator[Document | Skipped]:
    """Read and judge every file, in the order of ``corpus.files``."""

    def judge(path: str) -> Document | Skipped:
        try:
            raw = (corpus.root / path).read_bytes()
        except OSError as error:
            return Skipped(path, f"unreadable: {error.strerror}")
        if not raw:
            return Skipped(path, "empty")
        try:
            raw.decode("utf-8", "strict")
        except UnicodeDecodeError as error:
            return Skipped(path, f"not UTF-8: byte {error.start} ({error.reason})")
        return Document(path, len(raw), content_digest(raw))

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(judge, corpus.files)


def _key(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def split_documents(
    documents: list[Document], validation_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents, each globally shuffled; both depend on ``seed`` and the documents
    alone.

    Documents are held out in the order of a keyed hash of their content until they make
    ``validation_fraction`` of the bytes. Equal documents have equal hashes and fall on the same side, so no
    held-out text was trained on whole.
    """
    target = validation_fraction * sum(document.size for document in documents)
    by_content = sorted(documents, key=lambda d: (_key(seed, "split", d.digest), d.path))
    held, size, last = 0, 0, ""
    while held < len(by_content) and (size < target or by_content[held].digest == last):
        size, last = size + by_content[held].size, by_content[held].digest
        held += 1
    if held == len(by_content):
        held = 0  # too few distinct documents to hold any out

    def shuffled(part: list[Document]) -> list[Document]:
        return sorted(part, key=lambda d: _key(seed, "order", d.path))

    return shuffled(by_content[held:]), shuffled(by_content[:held])
