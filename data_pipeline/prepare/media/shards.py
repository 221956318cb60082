"""Writing samples as tar shards with sidecars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

from data_pipeline.store import tar
from data_pipeline.store.sidecar import digest_of_bytes, encode_samples_sidecar


class SampleShardWriter:
    """Writes the samples of one shard to ``stream``; the key of each is its number in the split, twelve digits, after
    the split's prefix."""

    def __init__(self, stream: BinaryIO, name: str, first_number: int, prefix: str = "") -> None:
        self._stream, self._name, self._number = stream, name, first_number
        self._prefix = prefix
        self._position = 0
        self._samples: list[dict[str, Any]] = []
        self._payload = self._largest = 0

    def add(self, members: Sequence[tuple[str, bytes, str]], attributes: dict[str, Any]) -> None:
        """Write one sample; ``members`` are (extension, payload, xxh3 in hex)."""
        key = f"{self._prefix}{self._number:012d}"
        listed = {}
        for extension, payload, xxh3 in members:
            padding = tar.padding_after(len(payload))
            self._stream.write(tar.member_header(f"{key}.{extension}", len(payload)))
            self._stream.write(payload)
            self._stream.write(bytes(padding))
            offset = self._position + tar.BLOCK
            self._position = offset + len(payload) + padding
            listed[extension] = {"offset": offset, "length": len(payload), "xxh3": xxh3}
        size = sum(len(payload) for _, payload, _ in members)
        self._payload += size
        self._largest = max(self._largest, size)
        self._samples.append({"key": key, "members": listed, "attributes": attributes})
        self._number += 1

    def finish(self) -> tuple[dict[str, Any], bytes, int]:
        """Write the end of the archive; returns the shard's entry in the manifest, its sidecar, and the payload bytes
        of its largest sample."""
        self._stream.write(tar.END_OF_ARCHIVE)
        size = self._position + len(tar.END_OF_ARCHIVE)
        sidecar = encode_samples_sidecar(self._name, size, self._samples)
        entry = {
            "name": self._name,
            "size": size,
            "samples": len(self._samples),
            "bytes": self._payload,
            "sidecar_hash": digest_of_bytes(sidecar),
        }
        return entry, sidecar, self._largest
