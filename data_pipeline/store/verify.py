"""Re-hash a whole dataset and collect every fault, instead of stopping at the first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import DamagedDataError
from data_pipeline.store import tar
from data_pipeline.store.manifest import Manifest, digest_of_file, load_sidecar
from data_pipeline.store.reader import BlockReader


def find_damage(folder: str | os.PathLike[str]) -> list[str]:
    """All faults of the dataset in ``folder``, one message each; an empty list means it is what was written.

    Raises ValueError or DamagedDataError only when the manifest itself cannot be used.
    """
    manifest = Manifest.load(folder)
    faults: list[str] = []
    recorded = manifest.content["tokenizer"]["hash"]
    try:
        if digest_of_file(manifest.tokenizer_path) != recorded:
            faults.append(f"{manifest.tokenizer_path}: does not match its hash in the manifest")
    except OSError as error:
        faults.append(f"{manifest.tokenizer_path}: {error.strerror}")
    for split in manifest.content["splits"].values():
        for shard in split["shards"]:
            faults.extend(_shard_faults(manifest, shard))
    return faults


def _shard_faults(manifest: Manifest, shard: dict[str, Any]) -> Iterator[str]:
    try:
        sidecar = load_sidecar(manifest.folder, shard)
    except DamagedDataError as error:
        yield str(error)
        return
    path = manifest.folder / shard["name"]
    listed = {
        (f"{block['key']}.{extension}", member["offset"], member["length"])
        for block in sidecar["blocks"]
        for extension, member in block["members"].items()
    }
    try:
        with open(path, "rb") as stream:
            found = {(member.name, member.offset, member.length) for member in tar.walk(stream, path)}
        if found != listed:
            names = ", ".join(sorted(name for name, _, _ in found ^ listed)[:3])
            yield f"{path}: members differ from the sidecar ({names} ...)"
    except DamagedDataError as error:
        yield str(error)
    # Blocks are read one by one even after a failed walk, so that each damaged member is named.
    reader = BlockReader(manifest, manifest.shard_blocks(shard))
    for index in range(len(reader.blocks)):
        try:
            reader.read(index)
        except DamagedDataError as error:
            yield str(error)
