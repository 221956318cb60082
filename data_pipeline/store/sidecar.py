"""The sidecar of a shard: a JSON file beside it that says where each member lies and what its bytes hash to.

Both formats share its frame: ``shard`` (name), ``size`` (bytes), one list of entries (``blocks`` of text, or
``samples``), and, where headers of other writers are in the shard, ``frame``: the xxh3 hash of all bytes that
are no payload, in order.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import DamagedDataError, MissingDataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from data_pipeline.fetch.storage import Storage

PREPARE_AGAIN = "What to do: restore it from a copy, or prepare the dataset again with --force."
_REMOTE_REQUESTS = 16
_COMPACT = json.JSONEncoder(separators=(",", ":"))


def storage_at(location: str | os.PathLike[str] | Storage) -> Storage:
    """``location`` itself when it is a storage, else the storage of that folder or URL."""
    if isinstance(location, (str, os.PathLike)):
        from data_pipeline.fetch.storage import open_storage

        return open_storage(location)
    return location


def local_folder(storage: Storage) -> Path | None:
    """The folder of a storage of local files; None for a remote one."""
    from data_pipeline.fetch.storage import LocalStorage

    return storage.folder if isinstance(storage, LocalStorage) else None


def url_of(storage: Storage, name: str) -> str:
    """Path or URL of a file of ``storage``, as it stands in messages."""
    return f"{storage.url.rstrip('/')}/{name}"


def sidecar_name(shard_name: str) -> str:
    """``train-000000.tar`` -> ``train-000000.json``; folders in the name stay."""
    return str(PurePosixPath(shard_name).with_suffix(".json"))


def sidecar_path(folder: Path, shard_name: str) -> Path:
    """Where the sidecar of a shard in a local ``folder`` lies."""
    return folder / sidecar_name(shard_name)


def digest_of_bytes(data: bytes) -> str:
    """128-bit blake2b in hex: the hash of sidecars and small files."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def encode_samples_sidecar(
    shard_name: str, size: int, samples: Sequence[dict[str, Any]], frame: str | None = None
) -> bytes:
    """The sidecar of a shard of samples: one line for each, so that large ones stay small and can be read.

    A sample is ``{"key", "members": {extension: {"offset", "length", "xxh3"}}, "attributes": {...}}``. A
    member whose header holds another name than ``KEY.EXTENSION`` also has ``"name"``.
    """
    head: dict[str, Any] = {"shard": shard_name, "size": size}
    if frame is not None:
        head["frame"] = frame
    lines = ",\n".join(map(_COMPACT.encode, samples))
    return f'{json.dumps(head)[:-1]}, "samples": [\n{lines}\n]}}\n'.encode()


def load_sidecar(
    location: str | os.PathLike[str] | Storage, shard: dict[str, Any], check_shard: bool = True
) -> dict[str, Any]:
    """The sidecar of one shard entry of the manifest, after checking its hash and (``check_shard``) the shard's size.

    ``location`` is the dataset's folder, URL or opened storage. Raises DamagedDataError naming the shard
    (MissingDataError when it or its sidecar is not there), FetchError.
    """
    storage = storage_at(location)
    name = shard["name"]
    try:
        size = storage.size(name) if check_shard else shard["size"]
        raw = storage.read(sidecar_name(name))
    except MissingDataError as error:
        reason = str(error).partition(" What to do:")[0]
        raise MissingDataError(f"shard {name}: {reason} {PREPARE_AGAIN}", shard=name) from None
    if size != shard["size"]:
        raise DamagedDataError(
            f"{url_of(storage, name)}: {size} bytes, the manifest says {shard['size']}. {PREPARE_AGAIN}", shard=name
        )
    if digest_of_bytes(raw) != shard["sidecar_hash"]:
        raise DamagedDataError(
            f"{url_of(storage, sidecar_name(name))}: sidecar of shard {name} does not match its hash in the "
            f"manifest. {PREPARE_AGAIN}",
            shard=name,
        )
    tree: dict[str, Any] = json.loads(raw)
    return tree


def load_sidecars(location: str | os.PathLike[str] | Storage, shards: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """The sidecars of ``shards`` in their order; several at once where each is a request. Raises as
    :func:`load_sidecar`."""
    storage = storage_at(location)
    if local_folder(storage) is not None or len(shards) < 2:
        yield from (load_sidecar(storage, shard) for shard in shards)
        return
    with ThreadPoolExecutor(min(_REMOTE_REQUESTS, len(shards)), "sidecars") as pool:
        yield from pool.map(lambda shard: load_sidecar(storage, shard), shards)
