"""One shard that another program wrote: a strict walk that yields its sidecar, or everything that is wrong."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from data_pipeline.errors import DamagedDataError
from data_pipeline.media.latent_source import LatentLayout
from data_pipeline.store import tar
from data_pipeline.store.content import attributes_of, latent_layout
from data_pipeline.store.frame import frame_hash
from data_pipeline.store.grouping import Signatures, extension_problem, is_metadata, is_refused, split_name
from data_pipeline.store.sidecar import digest_of_bytes, encode_samples_sidecar, sidecar_path

_FAULTS_SHOWN = 50
_REWRITE = "write this shard again without it"
_BUFFER = 1 << 18


@dataclass(frozen=True)
class ShardJob:
    """A shard to index: its name below ``folder``, the dataset's kind, extensions to admit besides the known."""

    folder: str
    name: str
    kind: str
    allow: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The tar."""
        return Path(self.folder) / self.name

    @property
    def draft(self) -> Path:
        """Where the sidecar lies until the whole dataset proves sound."""
        sidecar = sidecar_path(Path(self.folder), self.name)
        return sidecar.with_name(f".{sidecar.name}.indexing")


@dataclass
class ShardIndex:
    """What was found: the manifest's ``entry`` for a sound shard, ``faults`` otherwise. ``largest`` is the payload
    bytes of the largest sample; ``layouts`` of latents have (samples, byte and key of the first), and
    ``longest_conditioning`` is the most tokens of a conditioning sequence."""

    name: str
    entry: dict[str, Any] | None = None
    largest: int = 0
    longest_conditioning: int = 0
    signatures: Signatures = field(default_factory=Signatures)
    layouts: dict[LatentLayout, tuple[int, int, str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def index_shard(job: ShardJob) -> ShardIndex:
    """Walk one shard, hash its members and write the draft of its sidecar when there is no fault in it.

    The shard itself is only read. Raises OSError when it cannot be read or the draft not be written.
    """
    walker = _Walker(job)
    before = os.stat(job.path)
    with open(job.path, "rb", buffering=_BUFFER) as stream:
        for member in tar.walk(stream, job.path, foreign=True, report=walker.faults.append):
            walker.add(member, stream)
        walker.finish()
        if not walker.samples and not walker.faults:
            walker.fault(0, "holds no sample", remedy="remove this shard")
        frame = frame_hash(stream, walker.payloads, before.st_size)
    after = os.stat(job.path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        walker.fault(0, "changed while it was being indexed", remedy="index it once it is complete")
    result = ShardIndex(job.name, signatures=walker.signatures, layouts=walker.layouts)
    if walker.faults:
        shown = sorted(walker.faults, key=lambda error: error.byte or 0)[:_FAULTS_SHOWN]
        result.faults = [str(error) for error in shown]
        if len(walker.faults) > len(shown):
            result.faults.append(f"{job.path}: and {len(walker.faults) - len(shown)} more faults")
        return result
    sidecar = encode_samples_sidecar(job.name, before.st_size, walker.samples, frame)
    with open(job.draft, "wb") as draft:
        draft.write(sidecar)
        draft.flush()
        os.fsync(draft.fileno())
    result.largest, result.longest_conditioning = walker.largest, walker.longest_conditioning
    result.entry = {
        "name": job.name,
        "size": before.st_size,
        "samples": len(walker.samples),
        "bytes": walker.bytes,
        "sidecar_hash": digest_of_bytes(sidecar),
    }
    return result


class _Walker:
    """Groups members into samples as they come."""

    def __init__(self, job: ShardJob) -> None:
        self.samples: list[dict[str, Any]] = []
        self.payloads: list[tuple[int, int]] = []
        self.faults: list[DamagedDataError] = []
        self.signatures = Signatures()
        self.layouts: dict[LatentLayout, tuple[int, int, str]] = {}
        self.bytes = self.largest = self.longest_conditioning = 0
        self._job = job
        self._keys: set[str] = set()
        self._key: str | None = None
        self._start = 0
        self._members: dict[str, dict[str, Any]] = {}
        self._payloads: dict[str, bytes] = {}

    def fault(self, byte: int, problem: str, member: str | None = None, remedy: str = _REWRITE) -> None:
        """Record a fault."""
        self.faults.append(tar.damaged(self._job.path, byte, problem, member=member, remedy=remedy))

    def add(self, member: tar.TarMember, stream: BinaryIO) -> None:
        """Take the next member of the archive."""
        if is_metadata(member.name):
            return
        named = split_name(member.name)
        if named is None:
            self.fault(
                member.start, f"member {member.name!r} belongs to no sample: it has no KEY.EXTENSION", member.name
            )
            return
        key, extension = named
        objection = extension_problem(extension, self._job.allow)
        if objection:
            remedy = _REWRITE if is_refused(extension) else f"{_REWRITE}, or admit it with --allow {extension}"
            self.fault(member.start, f"member {member.name!r} {objection}", member.name, remedy)
        if key != self._key:
            self.finish()
            if key in self._keys:
                problem = f"key {key!r} appears again after other samples (member {member.name!r})"
                self.fault(member.start, problem, member.name, "write this shard again with each key once")
            self._keys.add(key)
            self._key, self._start = key, member.start
        if extension in self._members:
            problem = f"sample {key!r} has .{extension} twice (member {member.name!r})"
            self.fault(member.start, problem, member.name, "write this shard again with each key once")
            return
        stream.seek(member.offset)
        payload = stream.read(member.length)
        entry: dict[str, Any] = {
            "offset": member.offset,
            "length": member.length,
            "xxh3": xxhash.xxh3_64_hexdigest(payload),
        }
        if member.header_name != f"{key}.{extension}":
            entry["name"] = member.header_name
        self._members[extension] = entry
        self.payloads.append((member.offset, member.length))
        if self._job.kind != "foreign":
            self._payloads[extension] = payload

    def finish(self) -> None:
        """Close the sample at hand."""
        if self._key is None:
            return
        attributes: dict[str, Any] = {}
        if self._job.kind != "foreign":
            attributes, faults = attributes_of(self._job.kind, self._payloads)
            for extension, problem in faults:
                name = f"{self._key}.{extension}"
                self.fault(self._members[extension]["offset"], f"member {name}: {problem}", name)
            if self._job.kind == "latents" and not faults:
                self._add_layout(self._key, attributes)
        size = sum(entry["length"] for entry in self._members.values())
        self.bytes += size
        self.largest = max(self.largest, size)
        known = [extension for extension in self._members if extension_problem(extension, self._job.allow) is None]
        self.signatures.add(known, self._job.name, self._start, self._key)
        self.samples.append({"key": self._key, "members": self._members, "attributes": attributes})
        self._key, self._members, self._payloads = None, {}, {}

    def _add_layout(self, key: str, attributes: dict[str, Any]) -> None:
        layout = latent_layout(self._payloads, attributes)
        count, byte, first = self.layouts.get(layout, (0, self._start, key))
        self.layouts[layout] = (count + 1, byte, first)
        if layout.conditioning_dims:
            tokens = attributes["conditioning"][0] if layout.conditioning_dims == 2 else 1
            self.longest_conditioning = max(self.longest_conditioning, tokens)
