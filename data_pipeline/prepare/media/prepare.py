"""Preparing media: images with captions, latents, interleaved documents; one verified dataset folder out."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DatasetExistsError
from data_pipeline.prepare.media.inputs import Listing, list_media
from data_pipeline.prepare.media.options import MediaOptions
from data_pipeline.prepare.media.request import (
    REQUEST_NAME,
    MediaRequest,
    find_layout,
    inputs_digest,
    train_tokenizer,
)
from data_pipeline.prepare.media.stages import (
    CONVERT,
    WRITE,
    MediaStages,
    find_converted,
    find_written,
    make_plan,
    report_name,
)
from data_pipeline.prepare.metering import Counts, Drops, Progress, Status
from data_pipeline.prepare.pool import Workers
from data_pipeline.prepare.records import Dropped
from data_pipeline.prepare.tokenizer import TokenizerFile, load_tokenizer_file
from data_pipeline.prepare.workspace import Task, Workspace, workspace
from data_pipeline.store.manifest import (
    MANIFEST_NAME,
    SAMPLES_FORMAT,
    TOKENIZER_NAME,
    Manifest,
    encode_manifest,
    load_sidecar,
)
from data_pipeline.store.segments import choose_segments
from data_pipeline.store.sidecar import digest_of_bytes

_WAY_OUT = "What to do: choose another folder, or replace it with --force."


@dataclass(frozen=True)
class MediaReport:
    """What was done: ``manifest`` None of a task, which leaves finishing to a run without one (``waiting`` says for
    what work of others, if any is left); ``reused`` when the folder already held exactly this dataset; ``seconds`` of
    wall time."""

    manifest: Manifest | None
    reused: bool
    seconds: float
    waiting: str = ""


def prepare_media(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: MediaOptions,
    *,
    workers: int | None = None,
    task: Task | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MediaReport:
    """Prepare ``sources`` as a dataset of samples in ``out``.

    The result does not depend on ``workers`` (None: the usable cores) nor on tasks. A run that was killed goes on
    where it was. With ``task``, one of several processes that share the work does its slice of what is ready: samples
    are converted first; once all are, shards are written; the run without a task does what is left and finishes.

    Raises ValueError for sources that cannot be used, DatasetExistsError when ``out`` holds another dataset and
    ``force`` is not given, OSError when writing fails (a full disk included).
    """
    started = time.perf_counter()
    workers = workers or len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"workers {workers} must be at least 1")
    target = Path(os.path.abspath(out))
    if task is not None and force:
        raise ValueError(
            "--force cannot be given to one of several tasks, which would undo the work of the others. "
            f"What to do: remove {target} (and .{target.name}.preparing beside it), then start the tasks."
        )
    given = load_tokenizer_file(options.tokenizer) if options.tokenizer is not None else None
    listing = list_media(sources, options.kind, exclude=target)
    choices = options.choices(given)
    digest = inputs_digest(listing.pieces, choices)
    try:
        with workspace(target, task) as space:
            if not force and (target / MANIFEST_NAME).exists():
                return MediaReport(_existing(target, digest, choices), True, time.perf_counter() - started)
            request = _begin(space, listing, options, given, digest)
            run = _Run(space, request, workers, task, progress or (lambda status: None))
            waiting = run.convert() or run.write()
            if task is not None:
                return MediaReport(None, False, time.perf_counter() - started, waiting)
            _finish(space, listing, request, run.plan, choices, digest, sources)
            space.commit()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)} while writing the dataset {out}; finished work is kept. What to do: free "
            f"space (twice the source, about {2 * sum(p.size for p in listing.pieces) // 2**20 + 1} MiB, is enough) "
            "and run the same command again, or choose another folder",
        ) from error
    return MediaReport(Manifest.load(target), False, time.perf_counter() - started)


def _existing(out: Path, digest: str, choices: dict[str, Any]) -> Manifest:
    """The dataset already in ``out`` when it is the one asked for and whole; raises DatasetExistsError otherwise."""
    try:
        manifest = Manifest.load(out)
    except ValueError as error:
        raise DatasetExistsError(f"{out} holds a dataset that cannot be read ({error}). {_WAY_OUT}") from None
    if manifest.origin.get("inputs_digest") != digest:
        before = manifest.origin.get("options", {})
        changed = [f"{n} was {before.get(n)!r}, now {v!r}" for n, v in choices.items() if before.get(n) != v]
        difference = "; ".join(changed) or "the files have changed"
        raise DatasetExistsError(f"{out} already holds another dataset ({difference}). {_WAY_OUT}")
    try:
        for split in manifest.content["splits"].values():
            for shard in split["shards"]:
                load_sidecar(out, shard)
        if manifest.content["tokenizer"] is not None:
            manifest.tokenizer_bytes()
    except (ValueError, OSError) as error:
        raise DatasetExistsError(f"{out} holds this dataset, but damaged: {error} {_WAY_OUT}") from None
    return manifest


def _begin(
    space: Workspace, listing: Listing, options: MediaOptions, given: TokenizerFile | None, digest: str
) -> MediaRequest:
    """The request in the work folder, which is taken up when it is this one; other work there is removed."""
    tree = space.folder.read_json(REQUEST_NAME) if space.folder.path.exists() else None
    if tree is not None and tree["digest"] != digest:
        if space.task is not None:
            raise ValueError(
                f"{space.folder.path} holds unfinished work of another preparation. What to do: remove or finish it."
            )
        space.discard()
        tree = None
    space.begin()
    if tree is None:
        tokenizer = given
        if tokenizer is None and options.kind == "interleaved":
            tokenizer = train_tokenizer(listing.pieces, options)
        latents = find_layout(listing.pieces, options) if options.kind == "latents" else None
        request = MediaRequest(options, listing.pieces, tokenizer, latents)
        space.folder.write_json(REQUEST_NAME, request.to_json(digest), first_wins=True)
    return MediaRequest.from_json(space.folder.read_json(REQUEST_NAME))


class _Run:
    """Does what one process, or one task of several, has to do."""

    def __init__(
        self, space: Workspace, request: MediaRequest, workers: int, task: Task | None, progress: Progress
    ) -> None:
        self.plan: dict[str, Any] = {}
        self._work, self._request, self._task, self._progress = space.folder, request, task, progress
        self._workers = Workers(workers, MediaStages, space.folder.path, space.folder.writer)

    def convert(self) -> str:
        """Convert the pieces of this task that are not; returns what is left for others, or nothing."""
        pieces = self._request.pieces
        done = find_converted(self._work, len(pieces))
        self._do(CONVERT, "converting", len(pieces), done, "pieces")
        left = len(pieces) - len(find_converted(self._work, len(pieces)))
        return _left(left, len(pieces), "pieces of input")

    def write(self) -> str:
        """Write the shards of this task that are not; returns what is left for others, or nothing."""
        self.plan = make_plan(self._work, self._request)
        if not self.plan["samples"]:
            example = self.plan["drops"]["examples"][0]
            raise ValueError(
                f"none of the samples can be used; the first, {example['path']}: {example['why']}. "
                "What to do: check the source and the options."
            )
        shards = self.plan["shards"]
        self._do(WRITE, "writing shards", len(shards), find_written(self._work, shards), "shards")
        left = len(shards) - len(find_written(self._work, shards))
        return _left(left, len(shards), "shards")

    def _do(self, stage: str, phase: str, total: int, done: set[int], unit: str) -> None:
        own = range(total) if self._task is None else range(self._task.index, total, self._task.count)
        todo = [number for number in own if number not in done]
        earlier, finished = len(own) - len(todo), 0
        started, counts = time.monotonic(), Counts()

        def show() -> None:
            seconds = time.monotonic() - started
            self._progress(Status(phase, earlier + finished, len(own), unit, counts, seconds, earlier))

        def counted(more: Counts) -> None:
            counts.add(more)
            show()

        with self._workers as workers:
            for _ in workers.run(stage, todo, counted):
                finished += 1
                show()


def _left(left: int, total: int, what: str) -> str:
    return f"{left} of {total} {what} are left to other tasks" if left else ""


def _finish(
    space: Workspace,
    listing: Listing,
    request: MediaRequest,
    plan: dict[str, Any],
    choices: dict[str, Any],
    digest: str,
    sources: Sequence[str | os.PathLike[str]],
) -> None:
    """Write tokenizer and manifest into the dataset folder."""
    from importlib.metadata import version

    work, options = space.folder, request.options
    reports = {shard["name"]: work.read_json(report_name(shard["name"])) for shard in plan["shards"]}
    expected = {f"{name}{suffix}" for name in reports for suffix in (".tar", ".json")}
    for path in list(work.dataset.iterdir()):  # nothing but this plan's shards may be in the dataset
        if path.name not in expected:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    splits = {name: _split(name, plan["shards"], reports) for name in ("train", "validation")}
    train = [r for shard in plan["shards"] if shard["split"] == "train" for r in [reports[shard["name"]]]]
    sizes = [(r["entry"]["bytes"], r["entry"]["samples"], r["largest"]) for r in train]
    segment_bytes, lanes = choose_segments(sizes)
    if options.segment_bytes is not None:
        segment_bytes, lanes = options.segment_bytes, lanes_for(sizes, options.segment_bytes)
    tokenizer = None
    if request.tokenizer is not None:
        text = request.tokenizer.text.encode()
        work.write(f"dataset/{TOKENIZER_NAME}", text)
        tokenizer = {"hash": digest_of_bytes(text), **request.tokenizer.describe()}
    content: dict[str, Any] = {
        "kind": options.kind,
        "num_lanes": lanes,
        "segment_bytes": segment_bytes,
        "tokenizer": tokenizer,
        "splits": splits,
    }
    if options.kind == "latents":
        assert request.latents is not None
        content["latents"] = {**request.latents, **plan["facts"]}
    elif options.kind == "interleaved":
        content["interleaved"] = plan["facts"]
    drops = Drops.merged([plan["drops"]])
    for name, reason, detail in listing.left_out:
        drops.add(Dropped(name, reason, detail))
    found = drops.to_json()
    libraries = ("pillow", "simplejpeg", "soundfile", "tokenizers")
    origin = {
        "corpus": " ".join(os.path.basename(os.fspath(source).rstrip("/")) for source in sources),
        "root": " ".join(str(source) if "://" in str(source) else os.path.abspath(source) for source in sources),
        "options": choices,
        "inputs_digest": digest,
        "versions": {name: version(name) for name in libraries},
        "skipped": found["examples"],
        "dropped": found["counts"],
    }
    work.write(f"dataset/{MANIFEST_NAME}", encode_manifest(content, origin, SAMPLES_FORMAT))


def _split(name: str, shards: list[dict[str, Any]], reports: dict[str, Any]) -> dict[str, Any]:
    entries = [reports[shard["name"]]["entry"] for shard in shards if shard["split"] == name]
    return {
        "samples": sum(entry["samples"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "shards": entries,
    }


def lanes_for(shards: Sequence[tuple[int, int, int]], segment_bytes: int) -> int:
    """Recommended lanes for a given segment size; ``shards`` as for :func:`choose_segments`."""
    segments = 0
    for payload, samples, largest in shards:
        segments += max(1, min(samples, payload // (segment_bytes + largest - 1)))
    return min(1024, 1 << (max(1, segments // 4).bit_length() - 1))
