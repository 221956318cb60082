"""What inspect shows, compared with counts made here; and the verbs on the command line."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from store_sets import change, flipped, foreign_archive, image_members, image_set, text_set

from data_pipeline.cli import add_arguments, run
from data_pipeline.errors import DamagedDataError
from data_pipeline.store.histogram import bars, histogram
from data_pipeline.store.inspection import dropped_by_reason, inspect_dataset, to_json
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.plots import write_plots
from data_pipeline.store.reader import BlockReader


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=40))
@settings(deadline=None)
def test_histogram_counts_every_value_in_its_bin(values: list[int]) -> None:
    found = histogram(np.array(values), "tokens")
    edges, counts = found["edges"], found["counts"]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(low <= value < high for value in values)
    assert sum(counts) == len(values) == found["number"]
    assert counts[0] > 0
    assert counts[-1] > 0
    assert (found["smallest"], found["largest"]) == (min(values), max(values))


def test_bars_are_as_long_as_their_counts() -> None:
    lines = list(bars(histogram(np.array([1] * 80 + [2] * 40 + [4] * 1), "x")))
    assert [line.count("█") for line in lines] == [40, 20, 0]
    assert "▌" in lines[2] or "▋" in lines[2] or "▍" in lines[2]
    assert [line.split()[-1] for line in lines] == ["80", "40", "1"]
    assert list(bars(histogram(np.array([]), "x"))) == []


def documents(manifest: Manifest) -> list[np.ndarray]:
    blocks = manifest.blocks("train")
    reader = BlockReader(manifest, blocks)
    found = []
    for index in range(len(blocks)):
        arrays = reader.read(index)
        found += np.split(arrays.tokens, arrays.offsets[1:-1])
    return found


def test_text(tmp_path: Path) -> None:
    manifest = text_set(tmp_path / "set")
    tree = inspect_dataset(manifest, num_samples=2)
    mine = documents(manifest)
    assert tree["kind"] == "text"
    assert tree["splits"]["train"]["documents"] == len(mine) == tree["document_lengths"]["number"]
    assert tree["document_lengths"]["mean"] == pytest.approx(np.mean([len(d) for d in mine]))
    counts = Counter(int(token) for document in mine for token in document)
    top = tree["frequent_tokens"][0]
    assert counts[top["id"]] == max(counts.values())
    assert top["share"] == pytest.approx(max(counts.values()) / sum(counts.values()))
    assert sorted(tree["token_counts"]) == sorted(counts.values())
    assert tree["unused_tokens"] == 50 - len(counts)
    first = tree["samples"][0]
    assert len(tree["samples"]) == 2
    assert first["text"] == " ".join(f"w{token}" for token in mine[0][1:-1])
    assert first["tokens"] == len(mine[0])
    assert json.loads(to_json(tree))["fingerprint"] == manifest.fingerprint


def test_images(tmp_path: Path) -> None:
    manifest = image_set(tmp_path / "set", shards=2)
    tree = inspect_dataset(manifest, num_samples=3)
    assert tree["extensions"] == {"jpg": 6, "txt": 6}
    assert tree["image_sizes"] == {f"{16 + n}x24": 1 for n in range(6)}
    assert tree["widths"]["largest"] == 21
    assert tree["heights"]["counts"] == [6]
    assert [(s["key"], s["txt"], s["width"]) for s in tree["samples"]] == [
        ("000000", "picture 0", 16),
        ("000002", "picture 2", 18),
        ("000004", "picture 4", 20),
    ]


def test_damaged_sets_are_not_shown_as_sound(tmp_path: Path) -> None:
    manifest = image_set(tmp_path / "set")
    change(manifest.folder / "train-000000.tar", 600, 1, flipped)
    with pytest.raises(DamagedDataError, match=r"000000\.jpg"):
        inspect_dataset(manifest)
    assert inspect_dataset(manifest, num_samples=0)["samples"] == []


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({}, {}),
        (
            {"skipped": [{"path": "a", "why": "not UTF-8: byte 3"}, {"path": "b", "why": "empty"}] * 2},
            {"not UTF-8": 2, "empty": 2},
        ),
        (
            {"skipped": [{"path": "a", "why": "empty"}], "dropped": {"too short": 9, "empty": 70}},
            {"empty": 70, "too short": 9},
        ),
    ],
)
def test_dropped_documents_by_reason(origin: dict[str, Any], expected: dict[str, int]) -> None:
    assert dropped_by_reason(origin) == expected


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (text_set, {"document_lengths", "token_frequency"}),
        (image_set, {"image_pixels", "widths", "heights", "sample_bytes"}),
    ],
)
def test_plots_are_pictures(tmp_path: Path, make: Any, names: set[str]) -> None:
    written = write_plots(inspect_dataset(make(tmp_path / "set")), tmp_path / "plots")
    assert {path.stem for path in written} == names
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert len(set(picture.convert("L").getdata())) > 10  # something is drawn


def test_inspect_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = text_set(tmp_path / "text").folder
    assert call("inspect", text, "--samples", 1, "--plots", tmp_path / "plots") == 0
    printed = capsys.readouterr().out
    for part in ("train-000002.tar", "document lengths (tokens)", "most frequent tokens", "█", "document_lengths.png"):
        assert part in printed
    assert printed.count("member=") == 1
    assert call("inspect", text, "--json") == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["shards"] == 3
    images = image_set(tmp_path / "images").folder
    assert call("inspect", images) == 0
    printed = capsys.readouterr().out
    assert "image sizes (pixels)" in printed
    assert 'txt="picture 0"' in printed
    assert call("inspect", images, "--samples", -1) == 2
    assert "at least 0" in capsys.readouterr().err


def test_index_and_verify_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.tar").write_bytes(foreign_archive([*image_members(0, 3), ("x.pkl", b"x")]))
    (folder / "b.tar").write_bytes(foreign_archive(image_members(3, 3)))
    assert call("index", folder, "--kind", "images") == 2
    captured = capsys.readouterr()
    assert "a.tar: byte" in captured.out
    assert "'x.pkl' holds pickled Python objects" in captured.out
    assert "nothing was written" in captured.err
    (folder / "a.tar").write_bytes(foreign_archive(image_members(0, 3)))
    assert call("index", folder, "--kind", "images", "--validation", "b*") == 0
    assert "indexed" in capsys.readouterr().out
    assert call("index", folder, "--kind", "images", "--validation", "b*") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert call("index", folder) == 2
    assert "--force" in capsys.readouterr().err
    assert call("verify", folder) == 0
    captured = capsys.readouterr()
    assert "2 shards checked: all sound" in captured.out
    assert "verifying: 100 %" in captured.err
    change(folder / "b.tar", 700, 1, flipped)
    change(folder / "a.tar", 700, 1, flipped)
    assert call("verify", folder) == 2
    captured = capsys.readouterr()
    assert "2 shards checked: " in captured.out
    assert "a.tar: byte" in captured.out
    assert "b.tar: byte" in captured.out
