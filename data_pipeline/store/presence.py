"""Are the shards there, and their manifest intact? Answered in seconds, by sizes and sidecars, without reading shards.

:mod:`data_pipeline.store.verify` reads everything and takes as long as that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import DamagedDataError, FetchError
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.sidecar import PREPARE_AGAIN, load_sidecar, sidecar_name, url_of
from data_pipeline.store.verify import dataset_faults

# A file's size is one call or one request. Latency counts, not work: many at once.
_THREADS = 16
_MOST_LOCAL, _MOST_REMOTE = 20_000, 256
_SIDECARS = 64


@dataclass(frozen=True)
class Presence:
    """What was found of ``shards`` shards of ``bytes`` bytes: ``sized`` of them by size, and ``sidecars`` sidecars by
    hash, the chosen ones spread evenly. ``faults`` are damage, ``unreached`` what could not be asked."""

    shards: int
    bytes: int
    sized: int
    sidecars: int
    faults: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)


def look(manifest: Manifest, most_sized: int | None = None, most_sidecars: int = _SIDECARS) -> Presence:
    """Look at the manifest, the tokenizer and the shards of all splits.

    Sizes of at most ``most_sized`` shards are compared (None: enough for seconds), and sidecars of ``most_sidecars``.
    Raises nothing that a damaged or unreachable data set causes.
    """
    faults: list[str] = []
    unreached: list[str] = []
    shards = [shard for split in manifest.content["splits"].values() for shard in split["shards"]]
    most_sized = most_sized or (_MOST_LOCAL if manifest.is_local else _MOST_REMOTE)
    sized, sidecars = evenly(shards, most_sized), evenly(shards, most_sidecars)
    try:
        faults.extend(str(fault) for fault in dataset_faults(manifest))
    except FetchError as error:
        unreached.append(str(error))

    def size_fault(shard: dict[str, Any]) -> str | None:
        found = manifest.storage.size(shard["name"])
        if found == shard["size"]:
            return None
        where = url_of(manifest.storage, shard["name"])
        return f"{where}: {found} bytes, the manifest says {shard['size']}. {PREPARE_AGAIN}"

    def sidecar_fault(shard: dict[str, Any]) -> str | None:
        load_sidecar(manifest.storage, shard, check_shard=False)
        return None

    hashed = {shard["name"] for shard in sidecars}
    tasks = [(size_fault, shard) for shard in sized] + [(sidecar_fault, shard) for shard in sidecars]
    # A sidecar that is not there is noticed for every shard where that costs no request.
    tasks += [
        (_sidecar_exists(manifest), shard) for shard in sized if manifest.is_local and shard["name"] not in hashed
    ]

    def run(task: tuple[Any, dict[str, Any]]) -> tuple[str | None, bool]:
        look_at, shard = task
        try:
            return look_at(shard), False
        except DamagedDataError as error:
            return str(error), False
        except FetchError as error:
            return str(error), True

    with ThreadPoolExecutor(_THREADS, "presence") as pool:
        for text, is_unreached in pool.map(run, tasks):
            if text is not None:
                (unreached if is_unreached else faults).append(text)
    total = sum(shard["size"] for shard in shards)
    return Presence(len(shards), total, len(sized), len(sidecars), list(dict.fromkeys(faults)), unreached)


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, spread evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[:most])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _sidecar_exists(manifest: Manifest) -> Any:
    def fault(shard: dict[str, Any]) -> None:
        manifest.storage.size(sidecar_name(shard["name"]))

    return fault
