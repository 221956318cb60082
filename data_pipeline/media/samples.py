"""Samples of a prepared or indexed set: which members each has, and reading them with every byte checked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from data_pipeline.errors import DamagedDataError
from data_pipeline.fetch.storage import ByteRange, LocalStorage
from data_pipeline.store import tar
from data_pipeline.store.manifest import Manifest, Sample
from data_pipeline.store.reader import check_member

Fetch = Callable[[ByteRange], bytes]
Known = Callable[[str, str | None], DamagedDataError | None]
_KEPT_SIDECARS = 8
# Bytes between two wanted members below which one read is cheaper than two.
_READ_OVER = 1 << 16


def num_bytes(sample: Sample) -> int:
    """Bytes of all payloads of a sample."""
    return sum(member["length"] for member in sample.members.values())


def range_of(samples: Sequence[Sample]) -> ByteRange:
    """The bytes of neighbouring samples of one shard, from the first header to the end of the last payload."""
    members = [member for sample in samples for member in sample.members.values()]
    start = min(member["offset"] for member in members) - tar.BLOCK
    return ByteRange(samples[0].shard, start, max(member["offset"] + member["length"] for member in members))


class SampleReader:
    """Reads the samples of one split. Holds no file open between calls; may be used from any thread.

    ``fetch`` gives the bytes of a segment (a cache, say; ``close`` ends it); None reads from the set's own storage.
    """

    def __init__(
        self, manifest: Manifest, split: str, fetch: Fetch | None = None, close: Callable[[], None] | None = None
    ) -> None:
        self.manifest = manifest
        self.shards: list[dict[str, Any]] = list(manifest.split(split)["shards"])
        self._storage = manifest.storage
        self._fetch, self._close = fetch, close
        self._kept: OrderedDict[int, list[Sample]] = OrderedDict()
        self._lock = threading.Lock()

    def samples(self, shard: int) -> list[Sample]:
        """All samples of a shard by its number, from its sidecar. Raises DamagedDataError."""
        with self._lock:
            if shard in self._kept:
                self._kept.move_to_end(shard)
                return self._kept[shard]
        entry = self.shards[shard]
        found = self.manifest.shard_samples(entry)
        if len(found) != entry["samples"]:
            raise DamagedDataError(
                f"shard {entry['name']}: its sidecar lists {len(found)} samples, the manifest says {entry['samples']}. "
                "What to do: restore the sidecar from a copy, or prepare the data set again.",
                shard=entry["name"],
            )
        with self._lock:
            self._kept[shard] = found
            while len(self._kept) > _KEPT_SIDECARS:
                self._kept.popitem(last=False)
        return found

    def close(self) -> None:
        """End what is being fetched."""
        if self._close is not None:
            self._close()

    def open_segment(self, wanted: ByteRange) -> bytes | None:
        """The bytes of a whole segment where samples are better not fetched one by one; None on a local disk."""
        if self._fetch is not None:
            return self._fetch(wanted)
        if isinstance(self._storage, LocalStorage):
            return None
        return self._read(wanted)

    def members(
        self, sample: Sample, extensions: Sequence[str], segment: tuple[ByteRange, bytes] | None, known: Known | None
    ) -> dict[str, memoryview]:
        """Payloads of the given members, neighbours in one read, each checked against its header and hash.

        ``known`` tells of members that are not to be read again. Raises DamagedDataError naming shard and member.
        """
        for extension in extensions:
            if extension not in sample.members:
                raise self.damaged(sample, extension, f"missing; the sample has {', '.join(sorted(sample.members))}")
            if known is not None and (error := known(sample.shard, f"{sample.key}.{extension}")):
                raise error
        path = self.path(sample.shard)
        found: dict[str, memoryview] = {}
        for run in _runs(sample, extensions):
            entries = [sample.members[extension] for extension in run]
            start = entries[0]["offset"] - tar.BLOCK
            stop = entries[-1]["offset"] + entries[-1]["length"]
            if segment is not None:
                view = memoryview(segment[1])[start - segment[0].start : stop - segment[0].start]
            else:
                try:
                    view = memoryview(self._read(ByteRange(sample.shard, start, stop)))
                except DamagedDataError as error:
                    raise self.damaged(sample, run[0], f"cannot be read: {error}") from None
            for extension, entry in zip(run, entries, strict=True):
                found[extension] = check_member(view, start, path, sample.header_name(extension), entry)
        return found

    def damaged(self, sample: Sample, extension: str, problem: str, remedy: str | None = None) -> DamagedDataError:
        """The error for a member that holds something else than it should; ``remedy`` None: restore the shard."""
        name = f"{sample.key}.{extension}"
        first = min(member["offset"] for member in sample.members.values())
        byte = sample.members.get(extension, {}).get("offset", first)
        given = {} if remedy is None else {"remedy": remedy}
        return tar.damaged(self.path(sample.shard), byte, f"member {name}: {problem}", member=name, **given)

    def verify(self, wanted: ByteRange, payload: bytes) -> None:
        """Check all members of samples that lie in ``wanted``; for caches. Raises DamagedDataError."""
        number = next(n for n, entry in enumerate(self.shards) if entry["name"] == wanted.name)
        path, view = self.path(wanted.name), memoryview(payload)
        for sample in self.samples(number):
            for extension, entry in sample.members.items():
                if wanted.start < entry["offset"] and entry["offset"] + entry["length"] <= wanted.stop:
                    check_member(view, wanted.start, path, sample.header_name(extension), entry)

    def path(self, shard: str) -> str:
        """Path or URL of a shard, for messages."""
        return f"{self._storage.url.rstrip('/')}/{shard}"

    def _read(self, wanted: ByteRange) -> bytes:
        return self._storage.read(wanted.name, wanted.start, wanted.length)


def _runs(sample: Sample, extensions: Sequence[str]) -> list[list[str]]:
    """The members in stored order, in groups that are worth one read."""
    ordered = sorted(extensions, key=lambda extension: int(sample.members[extension]["offset"]))
    runs = [ordered[:1]]
    for extension in ordered[1:]:
        last = sample.members[runs[-1][-1]]
        if sample.members[extension]["offset"] - last["offset"] - last["length"] <= _READ_OVER:
            runs[-1].append(extension)
        else:
            runs.append([extension])
    return runs
