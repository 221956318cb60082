"""The blocks of a split, looked up by number; a shard's sidecar is read when one of its blocks is first asked for.

So opening a dataset takes the same time whatever its size.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, overload

from data_pipeline.errors import DamagedDataError
from data_pipeline.store.manifest import Block, Manifest
from data_pipeline.store.sidecar import PREPARE_AGAIN, url_of

_KEPT_SHARDS = 4096


class BlockIndex(Sequence[Block]):
    """All blocks of ``split`` in stored order. Indexing raises DamagedDataError and FetchError, as sidecars do.

    Without ``check_shards`` a sidecar is enough: its shard may be missing or of another size, which shows when it is
    read.
    """

    def __init__(self, manifest: Manifest, split: str, check_shards: bool = True) -> None:
        self._check_shards = check_shards
        self._manifest = manifest
        self._shards: list[dict[str, Any]] = manifest.split(split)["shards"]
        self._starts = [0, *accumulate(int(shard["blocks"]) for shard in self._shards)]
        self._numbers = {shard["name"]: number for number, shard in enumerate(self._shards)}
        self._loaded: dict[int, list[Block]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Block: ...

    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...

    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} is outside the {len(self)} blocks")
        shard = bisect_right(self._starts, index) - 1
        return self._shard(shard)[index - self._starts[shard]]

    def __iter__(self) -> Iterator[Block]:
        for number in range(len(self._shards)):
            yield from self._shard(number)

    def of_shard(self, name: str) -> list[Block]:
        """The blocks of one shard."""
        return self._shard(self._numbers[name])

    def check_sizes(self) -> None:
        """Compare the size of every shard of a local dataset with the manifest, which costs no read.

        Raises DamagedDataError with all shards that are missing or have another size.
        """
        faults = []
        first: DamagedDataError | None = None
        for shard in self._shards if self._manifest.is_local else ():
            where = url_of(self._manifest.storage, shard["name"])
            try:
                size = self._manifest.storage.size(shard["name"])
            except DamagedDataError as error:
                faults.append(str(error).partition(" What to do:")[0])
                first = first or error
                continue
            if size != shard["size"]:
                faults.append(f"{where}: {size} bytes, the manifest says {shard['size']}.")
        if faults:
            raise DamagedDataError(f"{' '.join(faults)} {PREPARE_AGAIN}", shard=first.shard if first else None)

    def _shard(self, number: int) -> list[Block]:
        blocks = self._loaded.get(number)
        if blocks is None:
            blocks = self._manifest.shard_blocks(self._shards[number], self._check_shards)
            if len(blocks) != self._starts[number + 1] - self._starts[number]:
                raise DamagedDataError(
                    f"{url_of(self._manifest.storage, self._shards[number]['name'])}: its sidecar lists {len(blocks)} "
                    f"blocks, the manifest {self._shards[number]['blocks']}. {PREPARE_AGAIN}",
                    shard=self._shards[number]["name"],
                )
            with self._lock:
                if len(self._loaded) >= _KEPT_SHARDS:
                    del self._loaded[next(iter(self._loaded))]
                self._loaded[number] = blocks
        return blocks
