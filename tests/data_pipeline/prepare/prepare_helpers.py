"""A JSONL corpus with a few bad lines, and ways to look at what came of it."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

from text_corpus import WORDS

from data_pipeline.store.manifest import Manifest
from data_pipeline.store.reader import BlockReader


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of ``folder`` by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def random_texts(count: int, seed: int = 11) -> list[str]:
    """Texts of 1 to 60 words, all different."""
    rng = random.Random(seed)
    return [f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for number in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    """One record with the field ``text`` for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))


def stored_documents(manifest: Manifest, split: str) -> list[list[int]]:
    """Token ids of every document, in stored order, without the frame."""
    reader = BlockReader(manifest, manifest.blocks(split))
    documents = []
    for index in range(len(reader.blocks)):
        block = reader.read(index)
        offsets = block.offsets.tolist()
        documents += [block.tokens[a + 1 : b - 1].tolist() for a, b in pairwise(offsets)]
    return documents
