"""What a user may choose about a text dataset."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.prepare.tokenizer import TokenizerFile, check_vocab_size
from data_pipeline.store.manifest import digest_of

_SMALLEST_BLOCK, _LARGEST_BLOCK, _MOST_LANES = 1 << 12, 1 << 20, 1024
_BLOCKS_WANTED, _BLOCKS_PER_LANE = 64, 4


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What decides the dataset besides the files.

    ``tokenizer`` is a ``tokenizer.json`` to use; without one a byte-level BPE with ``vocab_size`` ids is
    trained on the training documents. ``block_tokens`` None lets :func:`choose_block_tokens` decide.
    ``text_field`` is where a JSONL or Parquet record has its text. ``deduplicate`` keeps one of several equal
    documents.
    """

    tokenizer: str | None = None
    vocab_size: int = 4096
    validation_fraction: float = 0.02
    block_tokens: int | None = None
    shard_bytes: int = 1 << 28
    seed: int = 0
    text_field: str = "text"
    deduplicate: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation fraction {self.validation_fraction} must be at least 0 and below 1")
        if self.block_tokens is not None and self.block_tokens < 1:
            raise ValueError(f"block tokens {self.block_tokens} must be at least 1")
        if self.shard_bytes < 1:
            raise ValueError(f"shard bytes {self.shard_bytes} must be at least 1")
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)

    def choices(self, given: TokenizerFile | None) -> dict[str, Any]:
        """The options as JSON, a given tokenizer by the digest of its text."""
        tree = asdict(self)
        if given is not None:
            tree["tokenizer"] = digest_of(given.text)
            del tree["vocab_size"]
        return tree


def choose_block_tokens(estimated_tokens: int) -> int:
    """Block size in tokens: the power of two at or below 1/64 of the training set, within 4,096 and
    1,048,576.

    64 blocks or more leave a small set enough lanes to mix its documents; a million tokens is what makes
    reading blocks of a large set efficient.
    """
    return min(max(_floor_power_of_two(estimated_tokens // _BLOCKS_WANTED), _SMALLEST_BLOCK), _LARGEST_BLOCK)


def choose_num_lanes(num_blocks: int) -> int:
    """Recommended lanes: the power of two at or below a quarter of the training blocks, at most 1,024."""
    return min(_floor_power_of_two(num_blocks // _BLOCKS_PER_LANE), _MOST_LANES)


def _floor_power_of_two(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)
