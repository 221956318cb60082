"""What one preparation decided once: frozen after the survey, before anything is tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.prepare.encoding import Backend, choose_backend, make_backend
from data_pipeline.prepare.options import choose_block_tokens
from data_pipeline.prepare.request import Request
from data_pipeline.prepare.sample import sample_documents
from data_pipeline.prepare.survey import HeldOut
from data_pipeline.prepare.tokenizer import TokenizerFile
from data_pipeline.store.manifest import digest_of

PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Plan:
    """``held_out`` says which documents are not trained on. ``buckets`` of each split are its shards;
    ``first_shard`` numbers the first one. ``estimated_tokens`` of all documents."""

    held_out: HeldOut
    tokenizer: TokenizerFile
    backend: str
    backend_why: str
    block_tokens: int
    buckets: dict[str, int]
    first_shard: dict[str, int]
    estimated_tokens: int

    @property
    def num_buckets(self) -> int:
        return sum(self.buckets.values())

    @property
    def dtype(self) -> str:
        return self.tokenizer.dtype

    @property
    def needed_bytes(self) -> int:
        """Disk space of the work at its peak, about: spills and shards."""
        return 2 * self.estimated_tokens * np.dtype(self.dtype).itemsize

    @property
    def shard_bytes(self) -> int:
        """About the size of one shard."""
        return self.needed_bytes // 2 // self.num_buckets

    @cached_property
    def spill_digest(self) -> str:
        """Tells whether spills made by one plan serve another."""
        return digest_of([_as_tree(self.held_out), self.tokenizer.text, self.backend, self.buckets])

    def locate(self, bucket: int) -> tuple[str, int]:
        """(split, number of the shard) of ``bucket``."""
        for split, count in self.buckets.items():
            if bucket < count:
                return split, self.first_shard[split] + bucket
            bucket -= count
        raise AssertionError(bucket)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "held_out": _as_tree(self.held_out)}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Plan:
        held = HeldOut(int(tree["held_out"]["threshold"]), tree["held_out"]["largest"])
        return cls(**{**tree, "held_out": held, "tokenizer": TokenizerFile(**tree["tokenizer"])})


def _as_tree(held_out: HeldOut) -> dict[str, Any]:
    return {**asdict(held_out), "threshold": str(held_out.threshold)}  # above 2^53, which not every reader keeps


def make_plan(
    request: Request,
    tokenizer: TokenizerFile,
    held_out: HeldOut,
    text_bytes: int | None,
    existing: dict[str, Any] | None = None,
) -> Plan:
    """Decide everything that is left. ``text_bytes`` is the exact size of all documents where a survey found
    it; ``existing`` the content of the dataset to extend."""
    options = request.options
    sample = sample_documents(request.corpus, options.text_field)
    backend, why = choose_backend(request.backend, tokenizer, sample.documents)
    if text_bytes is None:
        text_bytes = int(request.corpus.size * sample.density)
    tokens = _estimate_tokens(make_backend(backend, tokenizer), sample.documents, text_bytes)
    block_tokens = options.block_tokens or choose_block_tokens(int(tokens * (1 - options.validation_fraction)))
    shards = tokens * np.dtype(tokenizer.dtype).itemsize / options.shard_bytes
    share = options.validation_fraction
    buckets = {"train": max(round(shards * (1 - share)), 1), "validation": max(round(shards * share), 1)}
    first = {"train": 0, "validation": 0}
    if existing is not None:
        block_tokens = int(existing["block_tokens"])
        buckets["validation"] = 0
        last = max(
            (int(s["name"].split("-")[1].split(".")[0]) for s in existing["splits"]["train"]["shards"]), default=-1
        )
        first["train"] = last + 1
    return Plan(held_out, tokenizer, backend, why, block_tokens, buckets, first, tokens)


def _estimate_tokens(backend: Backend, documents: Sequence[bytes], text_bytes: int) -> int:
    """Tokens of ``text_bytes`` of text, frames included, at the rate of the sample; at least 1."""
    _, lengths = backend(documents)
    return text_bytes * (int(lengths.sum()) + 2 * len(lengths)) // max(sum(map(len, documents)), 1) + 1
