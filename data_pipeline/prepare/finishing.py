"""The end of a preparation: the manifest, the dataset's name, and what is already there under it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DatasetExistsError
from data_pipeline.prepare.metering import Drops
from data_pipeline.prepare.options import PrepareOptions, choose_num_lanes
from data_pipeline.prepare.plan import Plan
from data_pipeline.prepare.request import Request
from data_pipeline.prepare.stages import HELD_OUT_NAME, TOKENISE, WRITE, read_marker, token_hashes
from data_pipeline.prepare.workspace import WorkFolder, Workspace, sync_folder
from data_pipeline.store.editions import appended
from data_pipeline.store.manifest import (
    FORMAT,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    digest_of_file,
    encode_manifest,
    sidecar_path,
)
from data_pipeline.store.reader import BlockReader
from data_pipeline.store.sidecar import digest_of_bytes, load_sidecar

_WAY_OUT = "What to do: choose another folder, or replace it with --force."


def tokenise_markers(work: WorkFolder, num_pieces: int) -> list[Any]:
    """What every tokenised piece left about itself, in order."""
    return [read_marker(work, TOKENISE, piece) for piece in range(num_pieces)]


def finish(space: Workspace, request: Request, plan: Plan) -> Manifest:
    """Write tokenizer and manifest beside the shards and give the dataset its name."""
    work = space.folder
    entries = _shard_entries(work, plan)
    text = plan.tokenizer.text.encode()
    work.write(f"dataset/{TOKENIZER_NAME}", text)
    splits = {split: _describe_split(entries[split]) for split in plan.buckets}
    content = {
        "dtype": plan.dtype,
        "block_tokens": plan.block_tokens,
        "num_lanes": choose_num_lanes(splits["train"]["blocks"]),
        "tokenizer": {"hash": digest_of_bytes(text), **plan.tokenizer.describe()},
        "splits": splits,
    }
    work.write(f"dataset/{MANIFEST_NAME}", encode_manifest(content, _origin(work, request, plan)))
    _remove_others(work, entries)
    space.commit()
    return Manifest.load(space.out)


def finish_append(space: Workspace, request: Request, plan: Plan, existing: Manifest) -> Manifest:
    """Move the new shards into the dataset, then replace its manifest: until then it is what it was."""
    work = space.folder
    entries = _shard_entries(work, plan)["train"]
    content = appended(existing, entries)
    origin = dict(existing.origin)
    origin["appended"] = [*origin.get("appended", []), _origin(work, request, plan)]
    data = encode_manifest(content, origin)
    for entry in entries:
        # A run killed in between misses what is moved already, and writes it again: the same bytes.
        for path in (sidecar_path(work.dataset, entry["name"]), work.dataset / entry["name"]):
            os.replace(path, space.out / path.name)
    sync_folder(space.out)
    work.write("dataset/" + MANIFEST_NAME, data)
    os.replace(work.dataset / MANIFEST_NAME, space.out / MANIFEST_NAME)
    sync_folder(space.out)
    space.discard()
    return Manifest.load(space.out)


def options_for_append(options: PrepareOptions, existing: Manifest) -> PrepareOptions:
    """``options`` as far as the dataset leaves a choice: tokenizer and block size are its own, and nothing more
    is held out. Raises ValueError for a dataset of another kind, or whose tokenizer has changed."""
    if existing.format != FORMAT:
        raise ValueError(f"{existing.location} holds {existing.kind}, not text. What to do: choose another folder.")
    if digest_of_file(existing.tokenizer_path) != existing.content["tokenizer"]["hash"]:
        raise ValueError(
            f"{existing.tokenizer_path} does not match its hash in the manifest. What to do: restore it from a copy."
        )
    return replace(
        options,
        tokenizer=str(existing.tokenizer_path),
        validation_fraction=0.0,
        block_tokens=int(existing.content["block_tokens"]),
    )


def holds(manifest: Manifest, request: Request) -> bool:
    """Whether the dataset was made, or extended before, by the very same request."""
    made = [manifest.origin] if request.appends_to is None else manifest.origin.get("appended", [])
    return any(origin.get("inputs_digest") == request.digest for origin in made)


def write_held_out(space: Workspace, existing: Manifest) -> None:
    """Leave the hashes of all held-out documents for the processes that tokenise."""
    reader = BlockReader(existing, existing.blocks("validation"))
    found = [np.empty(0, np.uint64)]
    for index in range(len(reader.blocks)):
        block = reader.read(index)
        lengths = np.diff(block.offsets)
        inner = np.ones(len(block.tokens), dtype=bool)
        inner[block.offsets[:-1]] = inner[block.offsets[1:] - 1] = False
        found.append(token_hashes(block.tokens[inner], lengths - 2))
    space.folder.write(HELD_OUT_NAME, np.unique(np.concatenate(found)).astype("<u8").tobytes())


def check_existing(out: Path, request: Request) -> Manifest:
    """The dataset already in ``out`` when it is the one asked for and whole; raises DatasetExistsError
    otherwise."""
    try:
        manifest = Manifest.load(out)
    except ValueError as error:
        raise DatasetExistsError(f"{out} holds a dataset that cannot be read ({error}). {_WAY_OUT}") from None
    if not holds(manifest, request):
        difference = differences(manifest.origin.get("options", {}), request.choices) or "; the files have changed"
        raise DatasetExistsError(
            f"{out} already holds another dataset (of {manifest.origin.get('corpus')}{difference}). {_WAY_OUT}"
        )
    try:
        for split in manifest.content["splits"].values():
            for shard in split["shards"]:
                load_sidecar(out, shard)
        if digest_of_file(manifest.tokenizer_path) != manifest.content["tokenizer"]["hash"]:
            raise ValueError(f"{manifest.tokenizer_path} has changed")
    except (ValueError, OSError) as error:
        raise DatasetExistsError(f"{out} holds this dataset, but damaged: {error} {_WAY_OUT}") from None
    return manifest


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """How options differ, for a message; empty when they do not."""
    changed = [
        f"; {name} was {then.get(name)!r}, now {value!r}" for name, value in now.items() if then.get(name) != value
    ]
    return "".join(changed)


def _shard_entries(work: WorkFolder, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """The manifest's shard entries of each split; a bucket without documents has none."""
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in plan.buckets}
    for bucket in range(plan.num_buckets):
        entry = read_marker(work, WRITE, bucket)["entry"]
        if entry is not None:
            entries[plan.locate(bucket)[0]].append(entry)
    return entries


def _describe_split(shards: list[dict[str, Any]]) -> dict[str, Any]:
    counts = ("documents", "bytes", "tokens", "blocks")
    return {**{name: sum(shard[name] for shard in shards) for name in counts}, "shards": shards}


def _origin(work: WorkFolder, request: Request, plan: Plan) -> dict[str, Any]:
    from importlib.metadata import version

    drops = Drops.merged(marker["dropped"] for marker in tokenise_markers(work, len(request.pieces)))
    duplicates = sum(read_marker(work, WRITE, bucket)["duplicates"] for bucket in range(plan.num_buckets))
    if duplicates:
        drops.counts["duplicate"] = duplicates
    found = drops.to_json()
    return {
        "corpus": request.corpus.name,
        "root": request.corpus.root,
        "files": len(request.corpus.files),
        "options": request.choices,
        "inputs_digest": request.digest,
        "tokenizers_version": version("tokenizers"),
        "tokenizer_backend": plan.backend,
        "tokenizer_backend_why": plan.backend_why,
        "dropped": found["counts"],
        "skipped": found["examples"],
    }


def _remove_others(work: WorkFolder, entries: dict[str, list[dict[str, Any]]]) -> None:
    """What an earlier plan of this work left must not become part of the dataset."""
    names = {MANIFEST_NAME, TOKENIZER_NAME}
    for entry in (entry for shards in entries.values() for entry in shards):
        names |= {entry["name"], sidecar_path(work.dataset, entry["name"]).name}
    for path in work.dataset.iterdir():
        if path.name not in names:
            path.unlink()
