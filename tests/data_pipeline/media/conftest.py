"""Datasets of media made once and read by many tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from media_samples import bfloat16_bits, caption, documents, image_files, latent, npy, write_files

from data_pipeline.prepare.media.options import MediaOptions
from data_pipeline.prepare.media.prepare import prepare_media
from data_pipeline.prepare.tokenizer import train_byte_level_bpe


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ``tokenizer.json``."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_byte_level_bpe([caption(number) for number in range(50)], 280).text)
    return path


@pytest.fixture(scope="session")
def image_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 60 images with captions; read only."""
    return write_files(tmp_path_factory.mktemp("pictures"), image_files(60))


@pytest.fixture(scope="session")
def image_set(image_source: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as a dataset of several shards in both splits, captions tokenised; read only."""
    out = tmp_path_factory.mktemp("images") / "set"
    options = MediaOptions(
        kind="images", shard_bytes=20_000, validation_fraction=0.2, tokenizer=str(tokenizer_file), seed=3
    )
    prepare_media([image_source], out, options, workers=1)
    return out


@pytest.fixture(scope="session")
def latent_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 bfloat16 latents with token embeddings and labels; read only."""
    files = {}
    for number in range(40):
        files[f"{number:04d}.lat.npy"] = npy(bfloat16_bits(latent(number)))
        files[f"{number:04d}.cond.npy"] = npy(np.full((number % 5 + 1, 7), number, np.float16))
        files[f"{number:04d}.json"] = json.dumps({"label": number}).encode()
    source = write_files(tmp_path_factory.mktemp("latents"), files)
    out = source.parent / (source.name + "_set")
    prepare_media([source], out, MediaOptions(kind="latents", shard_bytes=10_000, validation_fraction=0.15), workers=1)
    return out


@pytest.fixture(scope="session")
def document_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 50 documents with their media beside it; read only."""
    return documents(50, tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="session")
def document_set(document_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as a dataset with its own tokenizer; read only."""
    out = tmp_path_factory.mktemp("interleaved") / "set"
    options = MediaOptions(kind="interleaved", shard_bytes=60_000, validation_fraction=0.15, vocab_size=300)
    prepare_media([document_source], out, options, workers=1)
    return out
