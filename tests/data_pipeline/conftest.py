"""A small corpus and the dataset prepared from it, shared by the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from text_corpus import SMALL, write_corpus

from data_pipeline.prepare.text import prepare_text

# Examples are small; a busy machine is no failure.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a few text files; read only."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus prepared with several blocks and shards in both splits; read only."""
    out = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare_text(corpus, out, options=SMALL, workers=1)
    return out
