"""A small deterministic corpus and the options to prepare it with several blocks and shards in both
splits."""

from __future__ import annotations

import random
from pathlib import Path

from data_pipeline.prepare.text import PrepareOptions

WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"),
    *("größer", "naïve", "東京", "λ", "\n\t", "", "", "{}", "()", "=", "+=", "#"),
]


def write_corpus(folder: Path, num_documents: int = 60, seed: int = 7) -> dict[str, str]:
    """Documents of 1 to about 400 words, some outside ASCII; returns their text by relative path."""
    rng = random.Random(seed)
    texts = {}
    for number in range(num_documents):
        words = rng.choices(WORDS, k=rng.choice([1, 5, 40, 120, 400]))
        texts[f"part{number % 3}/document{number:03d}.txt"] = f"{number} " + " ".join(words)
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return texts


SMALL = PrepareOptions(vocab_size=300, validation_fraction=0.15, block_tokens=400, shard_bytes=6_000, seed=3)
