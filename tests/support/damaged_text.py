"""A small data set of many small blocks, and bits that flip in it."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from support.command import pretrain

from data_pipeline.config import TextDataConfig
from data_pipeline.store.manifest import Block, Manifest

VOCABULARY = 300
OVERRIDES = [
    "experiment=tiny",
    f"model.vocab_size={VOCABULARY}",
    "data.sequence_length=32",
    "data.num_lanes=4",
    "train.micro_batch_size=2",
    "train.eval_interval=0",
    "train.checkpoint_interval=2",
    "train.async_checkpoints=false",
]
"""Of a run on it: two ranks, steps of four rows."""


def prepare_blocks(out: Path) -> Path:
    """The data set, its plan made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prepare(
        out, "json/decoder.py", "--vocab-size", str(VOCABULARY), "--block-tokens", "150", "--validation-fraction", "0.2"
    )
    _source(out)
    return out


def prepare(out: Path, module: str, *more: str) -> None:
    """Small documents, five lines of a module of the standard library each."""
    lines = (Path(sysconfig.get_path("stdlib")) / module).read_text().splitlines()
    texts = ["\n".join(lines[at : at + 5]) for at in range(0, len(lines), 5)]
    source = out.with_name(f"{out.name}-{Path(module).stem}.jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))
    result = pretrain("data", "prepare", "text", source, out, "--workers", "1", *more)
    assert result.returncode == 0, result.stderr


def flip(folder: Path, block: Block) -> None:
    """Flip one bit of the block's tokens."""
    with open(folder / block.shard, "r+b") as stream:
        stream.seek(block.members["tok.npy"]["offset"] + 200)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def damage(folder: Path) -> str:
    """Flip a bit of the first block that rank 1 reads first, after the first two steps; returns its member."""
    source = _source(folder).train
    seen: set[str] = set()
    for index in range(32):
        fresh = {piece["member"] for piece in source.provenance(index)} - seen
        if index >= 8 and index % 4 >= 2 and fresh:
            member = min(fresh)
            break
        seen |= fresh
    else:
        raise AssertionError("no block is first read by rank 1")
    block = next(b for b in Manifest.load(folder).blocks("train") if f"{b.key}.tok.npy" == member)
    flip(folder, block)
    return member


def _source(folder: Path):  # type: ignore[no-untyped-def]
    return TextDataConfig(path=str(folder), sequence_length=32, num_lanes=4).build(1234)
