"""The dataset manifest: what a prepared or indexed dataset says about itself.

``manifest.json`` has two parts. ``content`` decides the data and their order: its digest is the dataset's
fingerprint. ``origin`` tells where the data came from (folder, library versions) and may differ between equal
datasets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import DamagedDataError, MissingDataError
from data_pipeline.store.editions import earlier_content, first_difference
from data_pipeline.store.sidecar import (
    PREPARE_AGAIN,
    digest_of_bytes,
    load_sidecar,
    load_sidecars,
    local_folder,
    storage_at,
    url_of,
)
from data_pipeline.store.sidecar import sidecar_path as sidecar_path

if TYPE_CHECKING:
    from data_pipeline.fetch.storage import Storage

FORMAT = "pretrain-text-blocks"
SAMPLES_FORMAT = "pretrain-samples"
FORMAT_VERSION = 1
SAMPLE_KINDS = ("images", "latents", "interleaved", "foreign")
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENS_EXTENSION = "tok.npy"
OFFSETS_EXTENSION = "off.npy"


def digest_of(value: Any) -> str:
    """128-bit blake2b of ``value`` as canonical JSON (sorted keys, no spaces), in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return digest_of_bytes(text.encode())


def digest_of_file(path: Path) -> str:
    """128-bit blake2b of a small file's bytes, in hex."""
    return digest_of_bytes(path.read_bytes())


def encode_manifest(content: dict[str, Any], origin: dict[str, Any], form: str = FORMAT) -> bytes:
    """The bytes of a ``manifest.json`` (``form``: ``FORMAT`` for text, ``SAMPLES_FORMAT`` for samples)."""
    tree = {
        "format": form,
        "version": FORMAT_VERSION,
        "fingerprint": digest_of(content),
        "content": content,
        "origin": origin,
    }
    return json.dumps(tree, indent=1).encode()


def identities(manifests: dict[str, Manifest]) -> dict[str, Any]:
    """What a run remembers of its datasets, to name the first shard that differs later: by name ``fingerprint``,
    ``editions`` (fingerprints of earlier states that the dataset contains) and ``shards``."""
    return {
        name: {
            "fingerprint": manifest.fingerprint,
            "editions": [edition["fingerprint"] for edition in manifest.content.get("editions", [])],
            "shards": manifest.shard_table(),
        }
        for name, manifest in manifests.items()
    }


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
class Sample:
    """One sample of media: where its members lie, by extension, and what is known without decoding them.

    ``members[extension]`` has ``offset`` and ``length`` of the payload in bytes, ``xxh3`` of it, and ``name``
    where the tar header before it holds another name than ``KEY.EXTENSION``.
    """

    shard: str
    key: str
    members: dict[str, dict[str, Any]]
    attributes: dict[str, Any]

    def header_name(self, extension: str) -> str:
        """The name in the tar header before the member's payload."""
        return str(self.members[extension].get("name", f"{self.key}.{extension}"))


@dataclass(frozen=True)
class Manifest:
    """A parsed and checked ``manifest.json`` of the dataset in ``storage``."""

    storage: Storage = field(repr=False, compare=False)
    content: dict[str, Any]
    origin: dict[str, Any]
    fingerprint: str
    format: str = FORMAT

    @classmethod
    def load(cls, location: str | os.PathLike[str], storage: Storage | None = None) -> Manifest:
        """Read and check the manifest in a folder or below a URL; ``storage``, when given, is what reads
        ``location``.

        Raises ValueError when there is none, DamagedDataError when it is not what was written or holds token ids
        outside its vocabulary, FetchError.
        """
        storage = storage_at(location if storage is None else storage)
        where = url_of(storage, MANIFEST_NAME)
        try:
            raw = storage.read(MANIFEST_NAME)
        except MissingDataError as error:
            raise _no_dataset(storage, error) from None
        try:
            tree = json.loads(raw)
            form, version = tree["format"], tree["version"]
            content, origin, fingerprint = tree["content"], tree["origin"], tree["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedDataError(f"{where}: not a dataset manifest ({error!r}). {PREPARE_AGAIN}") from None
        if form not in (FORMAT, SAMPLES_FORMAT) or version != FORMAT_VERSION:
            raise ValueError(
                f"{where}: format {form!r} version {version}; this program reads {FORMAT!r} and {SAMPLES_FORMAT!r} "
                f"version {FORMAT_VERSION}. What to do: prepare the dataset again with --force."
            )
        if digest_of(content) != fingerprint:
            raise DamagedDataError(
                f"{where}: its content does not match its fingerprint {fingerprint}. {PREPARE_AGAIN}"
            )
        outside = _shards_outside_vocabulary(content)
        if outside:
            raise DamagedDataError(f"{where}: {'; '.join(outside)}. {PREPARE_AGAIN}")
        return cls(storage, content, origin, fingerprint, form)

    @property
    def location(self) -> str:
        """The dataset's folder or URL."""
        return self.storage.url

    @property
    def folder(self) -> Path:
        """The local folder; raises ValueError for a dataset at a URL."""
        folder = local_folder(self.storage)
        if folder is None:
            raise ValueError(
                f"{self.location} is not a local folder. What to do: copy the dataset to a local folder first."
            )
        return folder

    @property
    def is_local(self) -> bool:
        """Whether the dataset lies in a local folder."""
        return local_folder(self.storage) is not None

    @property
    def kind(self) -> str:
        """``text``, or the kind of samples: ``images``, ``latents``, ``interleaved``, ``foreign``."""
        return "text" if self.format == FORMAT else str(self.content["kind"])

    @property
    def tokenizer_path(self) -> Path:
        """The ``tokenizer.json`` of a local dataset."""
        return self.folder / TOKENIZER_NAME

    def tokenizer_bytes(self) -> bytes:
        """The dataset's ``tokenizer.json``, local or remote, after checking its hash.

        Raises ValueError when the dataset has no tokenizer, DamagedDataError, FetchError.
        """
        recorded = self.content.get("tokenizer")
        if recorded is None:
            raise ValueError(f"{self.location}: a dataset of kind {self.kind} without a tokenizer")
        data = self.storage.read(TOKENIZER_NAME)
        if digest_of_bytes(data) != recorded["hash"]:
            raise DamagedDataError(
                f"{url_of(self.storage, TOKENIZER_NAME)}: does not match its hash in the manifest. {PREPARE_AGAIN}"
            )
        return data

    @property
    def vocab_size(self) -> int:
        """Number of token ids (largest possible id + 1)."""
        return int(self.content["tokenizer"]["vocab_size"])

    @property
    def dtype(self) -> str:
        """NumPy dtype string of the stored tokens (text only)."""
        return str(self.content["dtype"])

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that hold documents or samples."""
        unit = "documents" if self.format == FORMAT else "samples"
        return tuple(name for name, split in self.content["splits"].items() if split[unit])

    def split(self, name: str) -> dict[str, Any]:
        """Counts and shards of one split."""
        return dict(self.content["splits"][name])

    def blocks(self, split: str) -> list[Block]:
        """All blocks of ``split`` in stored order, from the sidecars, each checked against its hash in the
        manifest.

        Raises DamagedDataError when a sidecar or shard is missing, a sidecar differs or a shard has the wrong
        size; FetchError.
        """
        shards = self.split(split)["shards"]
        sidecars = load_sidecars(self.storage, shards)
        return [
            Block(shard=shard["name"], **entry)
            for shard, sidecar in zip(shards, sidecars, strict=True)
            for entry in sidecar["blocks"]
        ]

    def shard_blocks(self, shard: dict[str, Any], check_shard: bool = True) -> list[Block]:
        """The blocks of one shard entry of the manifest; raises as :meth:`blocks`, of the shard itself only with
        ``check_shard``."""
        sidecar = load_sidecar(self.storage, shard, check_shard)
        return [Block(shard=shard["name"], **entry) for entry in sidecar["blocks"]]

    def samples(self, split: str) -> list[Sample]:
        """All samples of ``split`` in stored order, from the sidecars; raises as :meth:`blocks`."""
        shards = self.split(split)["shards"]
        sidecars = load_sidecars(self.storage, shards)
        return [
            Sample(shard=shard["name"], **entry)
            for shard, sidecar in zip(shards, sidecars, strict=True)
            for entry in sidecar["samples"]
        ]

    def shard_samples(self, shard: dict[str, Any]) -> list[Sample]:
        """The samples of one shard entry of the manifest; raises as :meth:`blocks`."""
        return [Sample(shard=shard["name"], **entry) for entry in load_sidecar(self.storage, shard)["samples"]]

    def shard_table(self) -> list[dict[str, str]]:
        """``name`` and ``sidecar_hash`` of every shard in order, for :func:`first_difference`."""
        return [
            {"name": shard["name"], "sidecar_hash": shard["sidecar_hash"]}
            for split in self.content["splits"].values()
            for shard in split["shards"]
        ]

    def edition(self, fingerprint: str, shards_then: Sequence[dict[str, str]] | None = None) -> Manifest:
        """The dataset as it was when its fingerprint was ``fingerprint``, before shards were appended.

        ``shards_then`` is the :meth:`shard_table` of that time; with it, the error names the first shard that
        differs. Raises ValueError when the dataset never had this fingerprint, DamagedDataError when what is
        recorded of it does not give that fingerprint.
        """
        if fingerprint == self.fingerprint:
            return self
        content = earlier_content(self.content, fingerprint)
        if content is None:
            difference = None if shards_then is None else first_difference(shards_then, self.shard_table())
            known = [entry["fingerprint"] for entry in self.content.get("editions", [])]
            raise ValueError(
                f"{self.location}: its fingerprint is {self.fingerprint}, not {fingerprint}, and "
                + (f"not one of its earlier {', '.join(known)}" if known else "no shards were ever appended to it")
                + (f"; {difference}" if difference else "")
                + ". What to do: bring back the dataset as it was, or start a new run on this one."
            )
        if digest_of(content) != fingerprint:
            raise DamagedDataError(
                f"{url_of(self.storage, MANIFEST_NAME)}: the edition {fingerprint} cannot be rebuilt from it "
                f"(its digest is {digest_of(content)}). {PREPARE_AGAIN}"
            )
        return Manifest(self.storage, content, self.origin, fingerprint, self.format)


def _shards_outside_vocabulary(content: dict[str, Any]) -> list[str]:
    """Shards with a token id that the tokenizer does not have, which a model would look up outside its table."""
    vocab_size = (content.get("tokenizer") or {}).get("vocab_size", 0)
    return [
        f"shard {shard['name']} holds token id {shard['largest_id']}, outside the vocabulary of {vocab_size}"
        for split in content["splits"].values()
        for shard in split["shards"]
        if shard.get("largest_id", -1) >= vocab_size
    ]


def _no_dataset(storage: Storage, error: MissingDataError) -> ValueError:
    folder = local_folder(storage)
    if folder is None:
        return MissingDataError(f"{storage.url} is not a prepared dataset, or not readable: {error}")
    return ValueError(
        f"{folder} is not a prepared dataset: it has no {MANIFEST_NAME}. "
        f"What to do: pretrain data prepare text SOURCE_FOLDER {folder} "
        f"(or: pretrain data prepare stdlib {folder}); for shards made by another program: pretrain data index "
        f"{folder}."
    )
