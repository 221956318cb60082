"""The dataset manifest and the per-shard sidecars: what a prepared dataset says about itself.

``manifest.json`` has two parts. ``content`` decides the data and their order: its digest is the dataset's
fingerprint. ``origin`` tells where the data came from (folder, library versions) and may differ between equal
datasets.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.errors import DamagedDataError

FORMAT = "pretrain-text-blocks"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENS_EXTENSION = "tok.npy"
OFFSETS_EXTENSION = "off.npy"


def digest_of(value: Any) -> str:
    """128-bit blake2b of ``value`` as canonical JSON (sorted keys, no spaces), in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_of_file(path: Path) -> str:
    """128-bit blake2b of a small file's bytes, in hex."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Block:
    """One block of whole documents: where its two members lie (payload byte offsets) and what they hold."""

    shard: str
    key: str
    tokens: int
    documents: int
    largest_id: int
    members: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Manifest:
    """A parsed and checked ``manifest.json`` in ``folder``."""

    folder: Path
    content: dict[str, Any]
    origin: dict[str, Any]
    fingerprint: str

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read and check the manifest.

        Raises ValueError when there is none, DamagedDataError when it is not what was written.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(
                f"{folder} is not a prepared dataset: it has no {MANIFEST_NAME}. "
                f"What to do: pretrain data prepare text SOURCE_FOLDER {folder} "
                f"(or: pretrain data prepare stdlib {folder})."
            ) from None
        try:
            tree = json.loads(raw)
            form, version = tree["format"], tree["version"]
            content, origin, fingerprint = tree["content"], tree["origin"], tree["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedDataError(f"{path}: not a dataset manifest ({error!r}). {_PREPARE_AGAIN}") from None
        if form != FORMAT or version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format {form!r} version {version}; this program reads {FORMAT!r} version "
                f"{FORMAT_VERSION}. {_PREPARE_AGAIN}"
            )
        if digest_of(content) != fingerprint:
            raise DamagedDataError(
                f"{path}: its content does not match its fingerprint {fingerprint}. {_PREPARE_AGAIN}"
            )
        return cls(folder, content, origin, fingerprint)

    @cached_property
    def tokenizer_path(self) -> Path:
        """The dataset's ``tokenizer.json``."""
        return self.folder / TOKENIZER_NAME

    @property
    def vocab_size(self) -> int:
        """Number of token ids (largest possible id + 1)."""
        return int(self.content["tokenizer"]["vocab_size"])

    @property
    def dtype(self) -> str:
        """NumPy dtype string of the stored tokens."""
        return str(self.content["dtype"])

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that hold documents."""
        return tuple(name for name, split in self.content["splits"].items() if split["documents"])

    def split(self, name: str) -> dict[str, Any]:
        """Counts and shards of one split."""
        return dict(self.content["splits"][name])

    def blocks(self, split: str) -> list[Block]:
        """All blocks of ``split`` in stored order, from the sidecars, each checked against its hash in the
        manifest.

        Raises DamagedDataError when a sidecar or shard is missing, a sidecar differs or a shard has the wrong
        size.
        """
        return [block for shard in self.split(split)["shards"] for block in self.shard_blocks(shard)]

    def shard_blocks(self, shard: dict[str, Any]) -> list[Block]:
        """The blocks of one shard entry of the manifest; raises as :meth:`blocks`."""
        return [Block(shard=shard["name"], **entry) for entry in load_sidecar(self.folder, shard)["blocks"]]


def sidecar_path(folder: Path, shard_name: str) -> Path:
    """``train-000000.tar`` -> ``train-000000.json``."""
    return folder / (Path(shard_name).stem + ".json")


def load_sidecar(folder: Path, shard: dict[str, Any]) -> dict[str, Any]:
    """The sidecar of one shard entry of the manifest, after checking its hash and the shard's size.

    Raises DamagedDataError naming the shard.
    """
    name = shard["name"]
    sidecar = sidecar_path(folder, name)
    try:
        size = (folder / name).stat().st_size
        raw = sidecar.read_bytes()
    except FileNotFoundError as error:
        raise DamagedDataError(
            f"shard {name}: {error.filename} is missing. Restore it from a copy, or: {_PREPARE_AGAIN}"
        ) from None
    if size != shard["size"]:
        raise DamagedDataError(f"{folder / name}: {size} bytes, the manifest says {shard['size']}. {_PREPARE_AGAIN}")
    if hashlib.blake2b(raw, digest_size=16).hexdigest() != shard["sidecar_hash"]:
        raise DamagedDataError(
            f"{sidecar}: sidecar of shard {name} does not match its hash in the manifest. {_PREPARE_AGAIN}"
        )
    tree: dict[str, Any] = json.loads(raw)
    return tree


_PREPARE_AGAIN = "What to do: prepare the dataset again with --force."
