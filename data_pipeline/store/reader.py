"""Reading blocks of a prepared dataset, with every byte that is used checked first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from data_pipeline.errors import DamagedDataError
from data_pipeline.fetch.storage import ByteRange
from data_pipeline.store import tar
from data_pipeline.store.arrays import parse_npy
from data_pipeline.store.blocks import BlockIndex
from data_pipeline.store.manifest import OFFSETS_EXTENSION, TOKENS_EXTENSION, Block, Manifest

Fetch = Callable[[ByteRange], bytes]


@dataclass(frozen=True)
class BlockArrays:
    """``tokens`` [T] and ``offsets`` [documents + 1]: document d is tokens[offsets[d] : offsets[d + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class DamagedBlock:
    """A block whose tokens cannot be used; ``offsets`` when these at least are sound."""

    error: DamagedDataError
    offsets: np.ndarray | None


class Buffer:
    """Memory that is filled again and again: fresh memory costs as much as reading into it."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def view(self, length: int) -> memoryview:
        """``length`` bytes of it; what an earlier view showed is lost."""
        if len(self._bytes) < length:
            self._bytes = bytearray(length + length // 8)
        return memoryview(self._bytes)[:length]


class BlockReader:
    """Reads ``blocks``. Holds no file open between calls, so it may be used from any thread or process.

    ``fetch`` gives the bytes of a range of a shard (None: read from the dataset's storage).
    """

    def __init__(self, manifest: Manifest, blocks: Sequence[Block], fetch: Fetch | None = None) -> None:
        self.blocks = blocks
        self._storage = manifest.storage
        self._fetch = fetch or self._read_storage
        self._read_into = getattr(manifest.storage, "read_into", None) if fetch is None else None
        self.dtype = manifest.dtype
        self._vocab_size = manifest.vocab_size

    def shard_path(self, block: Block) -> str:
        """Path or URL of the block's shard, as it stands in messages."""
        return f"{self._storage.url.rstrip('/')}/{block.shard}"

    def ranges(self, indices: Sequence[int]) -> list[ByteRange]:
        """The bytes of blocks ``indices`` (ascending, neighbours), one range for each shard they lie in."""
        found: list[ByteRange] = []
        for index in indices:
            block = self.blocks[index]
            members = block.members.values()
            start = min(member["offset"] for member in members) - tar.BLOCK
            stop = max(member["offset"] + member["length"] for member in members)
            if found and found[-1].name == block.shard:
                found[-1] = ByteRange(block.shard, found[-1].start, stop)
            else:
                found.append(ByteRange(block.shard, start, stop))
        return found

    def verify(self, wanted: ByteRange, payload: bytes) -> None:
        """Check all members of blocks that lie in ``wanted``; for caches. Raises DamagedDataError."""
        view = memoryview(payload)
        blocks = self.blocks.of_shard(wanted.name) if isinstance(self.blocks, BlockIndex) else self.blocks
        for block in blocks:
            if block.shard != wanted.name:
                continue
            for extension, entry in block.members.items():
                if wanted.start < entry["offset"] and entry["offset"] + entry["length"] <= wanted.stop:
                    self._member(view, wanted.start, block, extension)

    def lengths(self, index: int) -> np.ndarray:
        """Tokens per document (int64) of block ``index``; reads only its offsets.

        Raises DamagedDataError.
        """
        block = self.blocks[index]
        entry = block.members[OFFSETS_EXTENSION]
        start = entry["offset"] - tar.BLOCK
        payload = self._read_storage(ByteRange(block.shard, start, entry["offset"] + entry["length"]))
        return np.diff(self._offsets(memoryview(payload), start, block))

    def read(self, index: int) -> BlockArrays:
        """Both arrays of block ``index``.

        Raises DamagedDataError, naming shard, member and remedy, when header, hash, dtype, offsets or ids are
        wrong.
        """
        result = self.read_run([index])[0]
        if isinstance(result, DamagedBlock):
            raise result.error
        return result

    def read_run(self, indices: Sequence[int], buffer: Buffer | None = None) -> list[BlockArrays | DamagedBlock]:
        """Blocks ``indices`` (ascending, neighbours), with one fetch for each shard they lie in.

        With ``buffer`` the arrays may lie in it: they hold until it is used again.
        """
        results: list[BlockArrays | DamagedBlock] = []
        at = 0
        ranges = self.ranges(indices)
        for wanted in ranges:
            count = sum(self.blocks[index].shard == wanted.name for index in indices[at:])
            blocks = [self.blocks[index] for index in indices[at : at + count]]
            at += count
            try:
                if buffer is not None and len(ranges) == 1 and self._read_into is not None:
                    payload = buffer.view(wanted.length)
                    self._read_into(wanted.name, wanted.start, payload)
                else:
                    payload = memoryview(self._fetch(wanted))
            except DamagedDataError:
                # One block short of bytes must not take its sound neighbours with it.
                results.extend(self._read_alone(block) for block in blocks)
            else:
                results.extend(self._parse(payload, wanted.start, block) for block in blocks)
        return results

    def _read_alone(self, block: Block) -> BlockArrays | DamagedBlock:
        offsets_entry = block.members[OFFSETS_EXTENSION]
        start = min(member["offset"] for member in block.members.values()) - tar.BLOCK
        stop = max(member["offset"] + member["length"] for member in block.members.values())
        try:
            return self._parse(memoryview(self._read_storage(ByteRange(block.shard, start, stop))), start, block)
        except DamagedDataError as error:
            end = offsets_entry["offset"] + offsets_entry["length"]
            try:
                payload = self._read_storage(ByteRange(block.shard, offsets_entry["offset"] - tar.BLOCK, end))
                offsets = self._offsets(memoryview(payload), offsets_entry["offset"] - tar.BLOCK, block)
            except DamagedDataError as cause:
                return DamagedBlock(self._of_block(cause, block, OFFSETS_EXTENSION), None)
            return DamagedBlock(self._of_block(error, block, TOKENS_EXTENSION), offsets)

    def _of_block(self, error: DamagedDataError, block: Block, extension: str) -> DamagedDataError:
        """``error`` of a storage, told as the damage of a member."""
        if error.member is not None:
            return error
        return _damaged(self.shard_path(block), block, extension, f"cannot be read: {error}")

    def _parse(self, payload: memoryview, start: int, block: Block) -> BlockArrays | DamagedBlock:
        try:
            offsets = self._offsets(payload, start, block)
        except DamagedDataError as error:
            return DamagedBlock(error, None)
        try:
            tokens = self._array(payload, start, block, TOKENS_EXTENSION, self.dtype)
        except DamagedDataError as error:
            return DamagedBlock(error, offsets)
        problem = None
        if len(tokens) != block.tokens:
            problem = f"{len(tokens)} tokens, the sidecar says {block.tokens}"
        elif len(tokens) and int(tokens.max()) >= self._vocab_size:
            problem = f"token id {int(tokens.max())} is outside the vocabulary of {self._vocab_size}"
        if problem:
            return DamagedBlock(_damaged(self.shard_path(block), block, TOKENS_EXTENSION, problem), offsets)
        return BlockArrays(tokens, offsets)

    def _offsets(self, payload: memoryview, start: int, block: Block) -> np.ndarray:
        offsets = self._array(payload, start, block, OFFSETS_EXTENSION, "<i8")
        ends_match = len(offsets) == block.documents + 1 and offsets[0] == 0 and offsets[-1] == block.tokens
        if not ends_match or bool((np.diff(offsets) <= 0).any()):
            problem = f"document offsets do not rise from 0 to {block.tokens} in {block.documents} steps"
            raise _damaged(self.shard_path(block), block, OFFSETS_EXTENSION, problem)
        return offsets

    def _array(self, payload: memoryview, start: int, block: Block, extension: str, dtype: str) -> np.ndarray:
        member = self._member(payload, start, block, extension)
        try:
            array = parse_npy(member)
            if array.dtype.str != dtype:
                raise ValueError(f"dtype {array.dtype.str} instead of {dtype}")
        except ValueError as error:
            raise _damaged(self.shard_path(block), block, extension, str(error)) from None
        return array

    def _member(self, payload: memoryview, start: int, block: Block, extension: str) -> memoryview:
        name = f"{block.key}.{extension}"
        return check_member(payload, start, self.shard_path(block), name, block.members[extension])

    def _read_storage(self, wanted: ByteRange) -> bytes:
        return self._storage.read(wanted.name, wanted.start, wanted.stop - wanted.start)


def check_member(payload: memoryview, start: int, shard: str, name: str, entry: dict[str, int | str]) -> memoryview:
    """The bytes of member ``name`` in ``payload``, which begins at byte ``start`` of ``shard``, after checking its tar
    header and its xxh3 hash against its sidecar ``entry`` (offset, length, xxh3).

    Raises DamagedDataError.
    """
    offset, length = int(entry["offset"]), int(entry["length"])
    at = offset - start
    header = bytes(payload[at - tar.BLOCK : at])
    found = tar.parse_header(shard, header, offset - tar.BLOCK)
    # Shards of other writers may hold another name there, such as a long one cut short.
    if (found.name, found.length) != (entry.get("name", name), length):
        problem = f"found member {found.name!r} of {found.length} bytes, the sidecar says {name!r} of {length}"
        raise tar.damaged(shard, offset - tar.BLOCK, problem, member=name)
    member = payload[at : at + length]
    if len(member) != length:
        raise tar.damaged(shard, offset, f"member {name}: {len(member)} of {length} bytes present", member=name)
    if xxhash.xxh3_64_hexdigest(member) != entry["xxh3"]:
        problem = f"member {name}: its bytes do not match their xxh3 hash in the sidecar"
        raise tar.damaged(shard, offset, problem, member=name)
    return member


def _damaged(shard: str, block: Block, extension: str, problem: str) -> DamagedDataError:
    name = f"{block.key}.{extension}"
    return tar.damaged(shard, block.members[extension]["offset"], f"member {name}: {problem}", member=name)
