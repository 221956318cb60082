"""Preparing text: files in, one verified dataset folder out."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DatasetExistsError
from data_pipeline.prepare.corpus import (
    Corpus,
    Document,
    Skipped,
    folder_corpus,
    scan,
    split_documents,
    stdlib_corpus,
)
from data_pipeline.prepare.tokenizer import (
    DocumentEncoder,
    Encoded,
    TokenizerFile,
    chunks,
    encode_in_order,
    load_tokenizer_file,
    read_document,
    train_byte_level_bpe,
)
from data_pipeline.prepare.workspace import Workspace, workspace
from data_pipeline.prepare.writer import ShardWriter, write_blocks, write_synced
from data_pipeline.store.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    digest_of,
    digest_of_file,
    load_sidecar,
)

Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, bytes done, bytes in all)``."""

# More text than this does not change the merges of a vocabulary of usual size, and the trainer holds its
# words in memory.
_TOKENIZER_TRAINING_BYTES = 1 << 28
_SMALLEST_BLOCK, _LARGEST_BLOCK, _MOST_LANES = 1 << 12, 1 << 20, 1024
_BLOCKS_WANTED, _BLOCKS_PER_LANE = 64, 4


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What decides the dataset besides the files.

    ``tokenizer`` is a ``tokenizer.json`` to use; without one a byte-level BPE with ``vocab_size`` ids is
    trained on the training documents. ``block_tokens`` None lets :func:`choose_block_tokens` decide.
    """

    tokenizer: str | None = None
    vocab_size: int = 4096
    validation_fraction: float = 0.02
    block_tokens: int | None = None
    shard_bytes: int = 1 << 28
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation fraction {self.validation_fraction} must be at least 0 and below 1")
        if self.block_tokens is not None and self.block_tokens < 1:
            raise ValueError(f"block tokens {self.block_tokens} must be at least 1")
        if self.shard_bytes < 1:
            raise ValueError(f"shard bytes {self.shard_bytes} must be at least 1")


@dataclass(frozen=True)
class PrepareReport:
    """What was done: ``reused`` when the folder already held exactly this dataset; ``seconds`` of wall
    time."""

    manifest: Manifest
    reused: bool
    seconds: float
    tokenize_seconds: float


def choose_block_tokens(estimated_tokens: int) -> int:
    """Block size in tokens: the power of two at or below 1/64 of the training set, within 4,096 and
    1,048,576.

    64 blocks or more leave a small set enough lanes to mix its documents; a million tokens is what makes
    reading blocks of a large set efficient.
    """
    return min(max(_floor_power_of_two(estimated_tokens // _BLOCKS_WANTED), _SMALLEST_BLOCK), _LARGEST_BLOCK)


def choose_num_lanes(num_blocks: int) -> int:
    """Recommended lanes: the power of two at or below a quarter of the training blocks, at most 1,024."""
    return min(_floor_power_of_two(num_blocks // _BLOCKS_PER_LANE), _MOST_LANES)


def _floor_power_of_two(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)


def prepare_text(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pattern: str = "**/*",
    options: PrepareOptions | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PrepareReport:
    """Prepare the files below ``source`` that match ``pattern`` as a dataset in ``out``.

    The result does not depend on ``workers`` (None: the usable cores). Files that are empty, unreadable or
    not UTF-8 are skipped and listed in the manifest. Nothing appears under the name ``out`` before it is
    complete.

    Raises ValueError for a missing or empty source, DatasetExistsError when ``out`` holds another dataset and
    ``force`` is not given, OSError when writing fails (a full disk included).
    """
    corpus = folder_corpus(source, pattern, exclude=Path(out))
    return _prepare(corpus, Path(out), options or PrepareOptions(), workers, force, progress)


def prepare_stdlib(
    out: str | os.PathLike[str],
    *,
    options: PrepareOptions | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PrepareReport:
    """Prepare the source files of the running interpreter's standard library; otherwise as
    :func:`prepare_text`."""
    return _prepare(stdlib_corpus(), Path(out), options or PrepareOptions(), workers, force, progress)


def _prepare(
    corpus: Corpus,
    out: Path,
    options: PrepareOptions,
    workers: int | None,
    force: bool,
    progress: Progress | None,
) -> PrepareReport:
    started = time.perf_counter()
    workers = workers or len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"workers {workers} must be at least 1")
    report = progress or (lambda phase, done, total: None)
    given = load_tokenizer_file(options.tokenizer) if options.tokenizer is not None else None
    documents, skipped = _scan(corpus, workers, report)
    origin = _origin(corpus, options, given, documents, skipped)
    try:
        with workspace(Path(os.path.abspath(out))) as space:
            if not force and (space.out / MANIFEST_NAME).exists():
                manifest = _existing(space.out, origin)
                return PrepareReport(manifest, True, time.perf_counter() - started, 0.0)
            space.begin()
            seconds = _write_dataset(space, corpus, documents, options, given, origin, workers, report)
            space.commit()
            manifest = Manifest.load(space.out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)} while writing the dataset {out}; what was written has been "
            f"removed. What to do: free space ({sum(d.size for d in documents) // 2**20 + 1} MiB are enough) "
            "or choose another folder",
        ) from error
    return PrepareReport(manifest, False, time.perf_counter() - started, seconds)


def _scan(corpus: Corpus, workers: int, report: Progress) -> tuple[list[Document], list[Skipped]]:
    documents: list[Document] = []
    skipped: list[Skipped] = []
    for done, item in enumerate(scan(corpus, workers), start=1):
        (documents if isinstance(item, Document) else skipped).append(item)  # type: ignore[arg-type]
        report("scanning files", done, len(corpus.files))
    if not documents:
        raise ValueError(
            f"none of the {len(skipped)} files of {corpus.root} can be used; the first, {skipped[0].path}, "
            f"is {skipped[0].why}. What to do: check the folder and --pattern."
        )
    return documents, skipped


def _origin(
    corpus: Corpus,
    options: PrepareOptions,
    given: TokenizerFile | None,
    documents: list[Document],
    skipped: list[Skipped],
) -> dict[str, Any]:
    from importlib.metadata import version

    choices = asdict(options)
    if given is not None:
        choices["tokenizer"] = digest_of(given.text)
        del choices["vocab_size"]
    return {
        "corpus": corpus.name,
        "root": str(corpus.root.resolve()),
        "options": choices,
        "inputs_digest": digest_of([[(d.path, d.digest) for d in documents], choices]),
        "tokenizers_version": version("tokenizers"),
        "skipped": [asdict(item) for item in skipped],
    }


def _existing(out: Path, origin: dict[str, Any]) -> Manifest:
    """The dataset already in ``out`` when it is the one asked for and whole; raises DatasetExistsError
    otherwise."""
    way_out = "What to do: choose another folder, or replace it with --force."
    try:
        manifest = Manifest.load(out)
    except ValueError as error:
        raise DatasetExistsError(f"{out} holds a dataset that cannot be read ({error}). {way_out}") from None
    if manifest.origin["inputs_digest"] != origin["inputs_digest"]:
        changed = [
            f"{name} was {manifest.origin['options'].get(name)!r}, now {value!r}"
            for name, value in origin["options"].items()
            if manifest.origin["options"].get(name) != value
        ]
        difference = "; ".join(changed) or "the files have changed"
        raise DatasetExistsError(
            f"{out} already holds another dataset (of {manifest.origin['corpus']}; {difference}). {way_out}"
        )
    try:
        for split in manifest.content["splits"].values():
            for shard in split["shards"]:
                load_sidecar(out, shard)
        if digest_of_file(manifest.tokenizer_path) != manifest.content["tokenizer"]["hash"]:
            raise ValueError(f"{manifest.tokenizer_path} has changed")
    except (ValueError, OSError) as error:
        raise DatasetExistsError(f"{out} holds this dataset, but damaged: {error} {way_out}") from None
    return manifest


def _write_dataset(
    space: Workspace,
    corpus: Corpus,
    documents: list[Document],
    options: PrepareOptions,
    given: TokenizerFile | None,
    origin: dict[str, Any],
    workers: int,
    report: Progress,
) -> float:
    """Write everything into the work folder; returns the seconds spent tokenising and writing shards."""
    train, validation = split_documents(documents, options.validation_fraction, options.seed)
    tokenizer = given or _train_tokenizer(corpus, train, options.vocab_size, report)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    arguments = (corpus.root, tokenizer, dtype)
    total = sum(document.size for document in documents)
    block_tokens = options.block_tokens or choose_block_tokens(_estimate_tokens(arguments, train))
    started = time.perf_counter()
    splits: dict[str, Any] = {}
    done = 0
    for name, part in (("train", train), ("validation", validation)):
        writer = ShardWriter(space.path, name, options.shard_bytes)

        def counted(encoded: Iterable[Encoded], part: list[Document] = part) -> Iterable[Encoded]:
            nonlocal done
            for chunk, item in zip(chunks(part), encoded, strict=True):
                done += sum(document.size for document in chunk)
                report("tokenising", done, total)
                yield item

        try:
            write_blocks(counted(encode_in_order(arguments, part, workers)), writer, block_tokens)
            writer.close()
        finally:
            writer.abandon()
        splits[name] = _describe_split(part, writer.shards)
    seconds = time.perf_counter() - started
    write_synced(space.path / TOKENIZER_NAME, tokenizer.text.encode())
    content = {
        "dtype": dtype,
        "block_tokens": block_tokens,
        "num_lanes": choose_num_lanes(splits["train"]["blocks"]),
        "tokenizer": {
            "hash": digest_of_file(space.path / TOKENIZER_NAME),
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "splits": splits,
    }
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "fingerprint": digest_of(content),
        "content": content,
        "origin": origin,
    }
    write_synced(space.path / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
    return seconds


def _describe_split(documents: list[Document], shards: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "documents": len(documents),
        "bytes": sum(document.size for document in documents),
        "tokens": sum(shard["tokens"] for shard in shards),
        "blocks": sum(shard["blocks"] for shard in shards),
        "shards": shards,
    }


def _train_tokenizer(corpus: Corpus, train: list[Document], vocab_size: int, report: Progress) -> TokenizerFile:
    """Trains on a prefix of the shuffled training documents, so that held-out text shapes nothing."""
    total = min(sum(document.size for document in train), _TOKENIZER_TRAINING_BYTES)

    def texts() -> Iterable[str]:
        done = 0
        for document in train:
            if done >= total:
                return
            done += document.size
            yield read_document(corpus.root, document)
            report("training the tokenizer", min(done, total), total)

    return train_byte_level_bpe(texts(), vocab_size)


def _estimate_tokens(arguments: tuple[Path, TokenizerFile, str], train: list[Document]) -> int:
    """Tokens of the training set, from the rate of its first megabyte."""
    sample = next(chunks(train))
    tokens = len(DocumentEncoder(*arguments)(sample).tokens)
    return tokens * sum(document.size for document in train) // sum(document.size for document in sample)
