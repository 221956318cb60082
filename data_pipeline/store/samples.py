"""Reading one whole sample of a sample dataset, every member checked."""

from __future__ import annotations

from data_pipeline.errors import DamagedDataError
from data_pipeline.store import tar
from data_pipeline.store.manifest import Manifest, Sample
from data_pipeline.store.reader import check_member
from data_pipeline.store.sidecar import url_of


def sample_range(sample: Sample) -> tuple[int, int]:
    """(first, end) bytes of the shard from the first member's header to the end of the last payload."""
    entries = sample.members.values()
    start = min(entry["offset"] for entry in entries) - tar.BLOCK
    return start, max(entry["offset"] + entry["length"] for entry in entries)


def read_sample(manifest: Manifest, sample: Sample) -> dict[str, memoryview]:
    """The payload of every member by extension.

    Raises DamagedDataError naming shard and member when header or hash is not what the sidecar says; FetchError.
    """
    label = url_of(manifest.storage, sample.shard)
    start, stop = sample_range(sample)
    try:
        payload = memoryview(manifest.storage.read(sample.shard, start, stop - start))
    except DamagedDataError as error:
        if error.member is not None or error.byte is None:
            raise
        raise tar.damaged(label, start, f"sample {sample.key!r} cannot be read: {error}", member=sample.key) from None
    return {
        extension: check_member(payload, start, label, f"{sample.key}.{extension}", entry)
        for extension, entry in sample.members.items()
    }
