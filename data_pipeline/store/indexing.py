"""``pretrain data index``: sidecars and a manifest for shards that another program wrote.

The shards are only read. Sidecars are drafted under hidden names and get their own once every shard has proved
sound; the manifest comes last, so a folder has one exactly when all of it is indexed.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DamagedDataError, DatasetExistsError
from data_pipeline.fetch.storage import check_name
from data_pipeline.media.latent_source import LatentLayout
from data_pipeline.store import tar
from data_pipeline.store.editions import appended, first_difference
from data_pipeline.store.foreign import ShardIndex, ShardJob, index_shard
from data_pipeline.store.grouping import Signatures
from data_pipeline.store.manifest import (
    MANIFEST_NAME,
    SAMPLES_FORMAT,
    TOKENIZER_NAME,
    Manifest,
    encode_manifest,
)
from data_pipeline.store.parallel import map_shards
from data_pipeline.store.segments import choose_segments
from data_pipeline.store.sidecar import sidecar_name, sidecar_path

Progress = Callable[[str, int, int], None]

INDEX_KINDS = ("foreign", "images", "latents")
_ORIGIN = "index"
_LOCK_NAME = ".index.lock"


class IndexFaultsError(DamagedDataError):
    """Shards that cannot be indexed: ``faults`` has one message for each fault of all of them."""

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.faults = list(faults)


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """What decides the index besides the shards.

    ``pattern`` chooses the shards below the folder, ``validation`` those of them that are held out (globs).
    ``optional`` extensions may be missing from samples; ``allow`` admits extensions besides the known ones.
    """

    kind: str = "foreign"
    pattern: str = "*.tar"
    validation: str | None = None
    optional: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in INDEX_KINDS:
            raise ValueError(f"kind {self.kind!r} must be one of {', '.join(INDEX_KINDS)}")


@dataclass(frozen=True)
class IndexReport:
    """What was done: ``reused`` when the folder already had exactly this index; ``seconds`` of wall time."""

    manifest: Manifest
    reused: bool
    seconds: float


def index_folder(
    folder: str | os.PathLike[str],
    options: IndexOptions | None = None,
    *,
    workers: int | None = None,
    force: bool = False,
    append: bool = False,
    progress: Progress | None = None,
) -> IndexReport:
    """Write sidecars and a manifest for the tars below ``folder``, in the order of their names.

    ``append`` adds the shards that the present index does not have at the end of the training split; the rest
    of the index stays as it is.

    Raises IndexFaultsError with every fault of every shard (nothing is then written), DatasetExistsError when the
    folder holds another dataset and ``force`` is not given, ValueError, OSError.
    """
    started = time.perf_counter()
    options = options or IndexOptions()
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. What to do: name the folder that holds the shards.")
    with _locked(folder):
        present = _present(folder, force, append)
        if append and present is None:
            raise ValueError(f"{folder} has no index to append to. What to do: index it without --append first.")
        names = _shard_names(folder, options)
        if append and present is not None:
            options = IndexOptions(**{**asdict(options), "kind": present.kind, "validation": None})
            known = {shard["name"] for shard in present.shard_table()}
            names = [name for name in names if name not in known]
            if not names:
                return IndexReport(present, True, time.perf_counter() - started)
        jobs = [ShardJob(str(folder), name, options.kind, options.allow) for name in names]
        _sweep(jobs)
        try:
            results = _index_all(jobs, options, present if append else None, workers, progress)
            content = _content(results, options) if not append or present is None else _appended(present, results)
            if present is not None and present.content == content:
                return IndexReport(present, True, time.perf_counter() - started)
            if present is not None and not force and not append:
                raise DatasetExistsError(_exists(present, content))
            for job in jobs:
                os.replace(job.draft, sidecar_path(folder, job.name))
            _write(folder / MANIFEST_NAME, encode_manifest(content, _origin(folder, options), SAMPLES_FORMAT))
        finally:
            _sweep(jobs)
    return IndexReport(Manifest.load(folder), False, time.perf_counter() - started)


def _present(folder: Path, force: bool, append: bool) -> Manifest | None:
    if not (folder / MANIFEST_NAME).exists():
        return None
    try:
        manifest = Manifest.load(folder)
    except ValueError as error:
        if force and not append:
            return None
        way_out = "What to do: index it again with --force."
        raise DatasetExistsError(f"{folder} holds a manifest that cannot be read ({error}). {way_out}") from None
    if manifest.origin.get("corpus") != _ORIGIN:
        raise DatasetExistsError(
            f"{folder} holds a prepared dataset of kind {manifest.kind}, which has its own sidecars. "
            "What to do: nothing; or index another folder."
        )
    return manifest


def _shard_names(folder: Path, options: IndexOptions) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob(options.pattern) if path.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        raise ValueError(f"{folder} has no file that matches {options.pattern!r}. What to do: check --pattern.")
    faults = []
    for name in names:
        try:
            check_name(name)
        except ValueError as error:
            faults.append(str(error))
            continue
        sidecar = sidecar_name(name)
        if sidecar == name or sidecar in (MANIFEST_NAME, TOKENIZER_NAME) or not _replaceable(folder / sidecar, name):
            faults.append(
                f"{folder / sidecar}: is in the way: the sidecar of shard {name} must have this name. What to do: "
                "rename the shard, or move that file away."
            )
    twice = {sidecar_name(name) for name in names}
    if len(twice) < len(names):
        faults.append(f"{folder}: two shards differ only in what follows the last dot. What to do: rename one.")
    if options.validation is not None:
        held_out = [name for name in names if fnmatch.fnmatch(name, options.validation)]
        if not held_out:
            faults.append(f"{folder}: no shard matches --validation {options.validation!r}. What to do: correct it.")
        if len(held_out) == len(names):
            faults.append(f"{folder}: every shard matches --validation; none is left to train on.")
    if faults:
        raise IndexFaultsError("\n".join(faults), faults)
    return names


def _replaceable(sidecar: Path, shard_name: str) -> bool:
    """Whether there is no such file, or one that is a sidecar of that shard."""
    try:
        tree = json.loads(sidecar.read_bytes())
    except FileNotFoundError:
        return True
    except (ValueError, OSError):
        return False
    return isinstance(tree, dict) and tree.get("shard") == shard_name and "samples" in tree


def _index_all(
    jobs: list[ShardJob],
    options: IndexOptions,
    present: Manifest | None,
    workers: int | None,
    progress: Progress | None,
) -> list[ShardIndex]:
    """Index every shard; ``present`` is the index that the shards are to fit. Raises IndexFaultsError."""
    sizes = [job.path.stat().st_size for job in jobs]
    total, done = sum(sizes), 0
    results: list[ShardIndex] = []
    for result, size in zip(map_shards(index_shard, jobs, total, workers), sizes, strict=True):
        results.append(result)
        done += size
        if progress is not None:
            progress("indexing", done, total)
    faults = [fault for result in results for fault in result.faults]
    together = Signatures()
    for result in results:
        together.merge(result.signatures)
    for shard, byte, key, problem in together.missing(options.optional):
        path = Path(jobs[0].folder) / shard
        remedy = "write the shard again, or name the extension with --optional if samples may lack it"
        faults.append(str(tar.damaged(path, byte, problem, member=key, remedy=remedy)))
    faults.extend(_layout_faults(jobs[0].folder, results, present))
    if faults:
        raise IndexFaultsError("\n".join(faults), faults)
    return results


def _layout_faults(folder: str, results: list[ShardIndex], present: Manifest | None) -> Iterator[str]:
    """Latents of one dataset are alike: all that differ from the layout of ``present``, or the most frequent one."""
    counts: Counter[LatentLayout] = Counter()
    for result in results:
        counts.update({layout: count for layout, (count, _, _) in result.layouts.items()})
    if not counts:
        return
    usual = counts.most_common(1)[0][0] if present is None else LatentLayout.of(present.content)
    remedy = "put samples of one layout into one dataset"
    for result in results:
        path = Path(folder) / result.name
        for layout, (count, byte, key) in result.layouts.items():
            if layout != usual:
                problem = f"sample {key!r} (the first of {count}) has {layout}, expected {usual}"
                yield str(tar.damaged(path, byte, problem, member=key, remedy=remedy))
        if present is not None:
            longest = present.content["latents"].get("longest_conditioning", 0)
            if result.longest_conditioning > longest:
                problem = f"a conditioning of {result.longest_conditioning} tokens, the dataset's longest has {longest}"
                yield str(tar.damaged(path, 0, problem, remedy="index all shards anew with --force"))


def _content(results: list[ShardIndex], options: IndexOptions) -> dict[str, Any]:
    parts: dict[str, list[ShardIndex]] = {"train": [], "validation": []}
    for result in results:
        held_out = options.validation is not None and fnmatch.fnmatch(result.name, options.validation)
        parts["validation" if held_out else "train"].append(result)
    entries = {split: [result.entry for result in part if result.entry] for split, part in parts.items()}
    largest = {result.name: result.largest for result in results}
    segment_bytes, num_lanes = choose_segments(
        [(entry["bytes"], entry["samples"], largest[entry["name"]]) for entry in entries["train"]]
    )
    content: dict[str, Any] = {
        "kind": options.kind,
        "num_lanes": num_lanes,
        "segment_bytes": segment_bytes,
        "tokenizer": None,
    }
    if options.kind == "latents":
        content["latents"] = _describe_latents(results)
    return content | {
        "splits": {
            split: {
                "samples": sum(shard["samples"] for shard in shards),
                "bytes": sum(shard["bytes"] for shard in shards),
                "shards": shards,
            }
            for split, shards in entries.items()
        },
    }


def _describe_latents(results: list[ShardIndex]) -> dict[str, Any]:
    layout = next(layout for result in results for layout in result.layouts)
    tree: dict[str, Any] = {
        "shape": list(layout.shape),
        "conditioning": None,
        "label": layout.has_label,
        "caption": layout.has_caption,
    }
    if layout.conditioning_dims:
        tree["conditioning"] = {"dims": layout.conditioning_dims, "width": layout.conditioning_width}
        tree["longest_conditioning"] = max(result.longest_conditioning for result in results)
    return tree


def _appended(present: Manifest, results: list[ShardIndex]) -> dict[str, Any]:
    return appended(present, [result.entry for result in results if result.entry])


def _origin(folder: Path, options: IndexOptions) -> dict[str, Any]:
    return {"corpus": _ORIGIN, "root": str(folder.resolve()), "options": asdict(options), "skipped": []}


def _exists(present: Manifest, content: dict[str, Any]) -> str:
    now = [shard for split in content["splits"].values() for shard in split["shards"]]
    difference = first_difference(present.shard_table(), now) or "other options"
    return (
        f"{present.location} already has another index ({difference}). What to do: pretrain data verify tells what "
        "is damaged; replace the index with --force, or add new shards to it with --append."
    )


def _sweep(jobs: list[ShardJob]) -> None:
    for job in jobs:
        job.draft.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.indexing")
    with open(draft, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / _LOCK_NAME
    handle = -1
    # Its holder removes the file, and a lock on a removed file guards nothing: open it until it is the present one.
    while handle < 0 or not path.exists() or os.stat(path).st_ino != os.fstat(handle).st_ino:
        if handle >= 0:
            os.close(handle)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"another process is indexing {folder}. What to do: wait for it.") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
