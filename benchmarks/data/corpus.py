"""The corpus: text that installed packages ship (source code and documentation), gathered once into a work folder.

Any machine with the project installed has enough of it. The choice is deterministic for a given installation: files
below 512 KiB of UTF-8, each content once, in the order of a hash of their path, until the wanted size is reached.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import xxhash

# fmt: off
_SUFFIXES = frozenset((
    ".py", ".pyi", ".pyx", ".pxd", ".md", ".rst", ".txt", ".json", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp",
    ".cu", ".js", ".html", ".yaml", ".yml", ".toml", ".tcl", ".cmake",
))
# fmt: on
_LARGEST = 512 << 10
_SMALLEST = 64
# Only for installations that are smaller than usual.
_FALLBACK = ("/usr/lib/python3/dist-packages", "/usr/share/doc", "/usr/include")
_TOKENIZER_SAMPLE_MB = 48
VOCABULARY = 50_000


def gather(work: Path, megabytes: int) -> Path:
    """The folder with the corpus of ``megabytes`` (0: all there is); written on the first call."""
    folder = work / f"corpus-{megabytes}"
    if (folder / "corpus.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    wanted = megabytes << 20 or sys.maxsize
    total = count = 0
    seen: set[int] = set()
    for path in _candidates(wanted):
        raw = _usable(path)
        digest = xxhash.xxh3_64_intdigest(raw)
        if not raw or digest in seen:
            continue
        seen.add(digest)
        target = folder / "text" / f"{count % 256:02x}" / f"{count:06d}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(raw)
        total, count = total + len(raw), count + 1
        if total >= wanted:
            break
    described = {"documents": count, "bytes": total, "digest": f"{_digest(seen):016x}"}
    (folder / "corpus.json").write_text(json.dumps(described))
    return folder


def describe(folder: Path) -> dict[str, object]:
    """Documents, bytes and digest of a gathered corpus."""
    described: dict[str, object] = json.loads((folder / "corpus.json").read_text())
    return described


def first_files(folder: Path, megabytes: float) -> list[Path]:
    """The first files of the corpus, in the order in which it was gathered, that make ``megabytes``."""
    chosen, total = [], 0
    for path in sorted((folder / "text").glob("*/*"), key=lambda path: path.name):
        chosen.append(path)
        total += path.stat().st_size
        if total >= megabytes * (1 << 20):
            break
    return chosen


def tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 50,000 ids, trained with HF ``tokenizers`` on the first 48 MiB of the corpus, once."""
    path = folder / "tokenizer.json"
    if not path.exists():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|bos|>", "<|eos|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        files = first_files(folder, _TOKENIZER_SAMPLE_MB)
        trained.train_from_iterator((file.read_text(encoding="utf-8") for file in files), trainer)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(trained.to_str(pretty=True), encoding="utf-8")
        temporary.replace(path)
    return path


def _candidates(wanted: int) -> Iterator[Path]:
    roots = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))]
    found = _below(roots)
    if sum(size for _, _, size in found) < wanted:
        found += _below([Path(root) for root in _FALLBACK])
    yield from (path for _, path, _ in sorted(found))


def _below(roots: list[Path]) -> list[tuple[int, Path, int]]:
    """(hash of the path below its root, path, size) of every file of a wanted kind and size."""
    found = []
    for root in roots:
        for folder, folders, names in os.walk(root):
            if Path(folder) == root and root.name != "site-packages":
                folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
            for name in names:
                path = Path(folder) / name
                if path.suffix.lower() in _SUFFIXES and path.is_file() and not path.is_symlink():
                    size = path.stat().st_size
                    if _SMALLEST <= size <= _LARGEST:
                        key = xxhash.xxh3_64_intdigest(path.relative_to(root).as_posix().encode())
                        found.append((key, path, size))
    return found


def _usable(path: Path) -> bytes:
    """The file's bytes; empty when it is not readable UTF-8."""
    try:
        raw = path.read_bytes()
        raw.decode("utf-8", "strict")
    except (OSError, UnicodeDecodeError):
        return b""
    return raw


def _digest(seen: set[int]) -> int:
    return int(xxhash.xxh3_64_intdigest(b"".join(value.to_bytes(8, "little") for value in sorted(seen))))
