"""Others read our shards unchanged: the standard library, webdataset and Megatron-Energon give the same documents and
samples as our own readers."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from store_sets import image_set, text_set

from data_pipeline.store.indexing import index_folder
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.reader import BlockReader
from data_pipeline.store.samples import read_sample
from data_pipeline.store.verify import find_damage

Samples = list[tuple[str, dict[str, bytes]]]


@pytest.fixture(params=[text_set, image_set], ids=["text", "samples"])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Manifest:
    return request.param(tmp_path / "set")


def urls(manifest: Manifest) -> list[str]:
    return [str(manifest.folder / shard["name"]) for shard in manifest.split("train")["shards"]]


def ours(manifest: Manifest) -> Samples:
    """Key and members of every block or sample, read by our own readers."""
    if manifest.kind != "text":
        samples = manifest.samples("train")
        return [(s.key, {name: bytes(part) for name, part in read_sample(manifest, s).items()}) for s in samples]
    blocks = manifest.blocks("train")
    reader = BlockReader(manifest, blocks)
    found = []
    for index, block in enumerate(blocks):
        arrays = reader.read(index)
        found.append((block.key, {"off.npy": saved(arrays.offsets), "tok.npy": saved(arrays.tokens)}))
    return found


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def named(sample: dict[str, Any]) -> dict[str, bytes]:
    return {name: part for name, part in sample.items() if not name.startswith("__")}


def test_standard_library_reads_the_same(manifest: Manifest) -> None:
    found = []
    for url in urls(manifest):
        with tarfile.open(url) as reference:
            for info in reference:
                assert info.isreg()
                assert (info.mtime, info.uid, info.gid, info.pax_headers) == (0, 0, 0, {})
                found.append((info.name, reference.extractfile(info).read()))  # type: ignore[union-attr]
    assert found == [(f"{key}.{name}", part) for key, parts in ours(manifest) for name, part in parts.items()]


def test_webdataset_reads_the_same(manifest: Manifest) -> None:
    found = [(s["__key__"], named(s)) for s in webdataset.WebDataset(urls(manifest), shardshuffle=False)]
    assert found == ours(manifest)


def test_webdataset_decodes_the_same_documents(tmp_path: Path) -> None:
    manifest = text_set(tmp_path / "set")
    documents = []
    for sample in webdataset.WebDataset(urls(manifest), shardshuffle=False).decode():
        documents += np.split(sample["tok.npy"], sample["off.npy"][1:-1])
    blocks = manifest.blocks("train")
    reader = BlockReader(manifest, blocks)
    mine = []
    for index in range(len(blocks)):
        arrays = reader.read(index)
        mine += np.split(arrays.tokens, arrays.offsets[1:-1])
    assert [d.tolist() for d in documents] == [d.tolist() for d in mine]
    assert len(mine) == manifest.split("train")["documents"]


def test_webdataset_decodes_the_same_pictures(tmp_path: Path) -> None:
    manifest = image_set(tmp_path / "set")
    decoded = webdataset.WebDataset(urls(manifest), shardshuffle=False).decode("rgb8")
    found = [(s["__key__"], s["jpg"].shape, s["txt"]) for s in decoded]
    assert found == [
        (s.key, (s.attributes["height"], s.attributes["width"], 3), f"picture {int(s.key)}")
        for s in manifest.samples("train")
    ]


def test_webdatasets_own_shards_are_indexed_as_it_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            writer.write({"__key__": f"k{number}", "txt": f"words {number}", "json": {"n": number}, "cls": number})
    manifest = index_folder(folder).manifest
    assert len(urls(manifest)) == 3
    found = [(s["__key__"], named(s)) for s in webdataset.WebDataset(urls(manifest), shardshuffle=False)]
    assert found == ours(manifest)
    assert find_damage(manifest) == []


def prepare_for_energon(folder: Path, names: list[str]) -> set[str]:
    from megatron.energon.flavors import BaseWebdatasetFactory

    parts = BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    return set(parts)


def test_energon_indexes_and_reads_the_same(manifest: Manifest) -> None:
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        get_loader,
        get_val_dataset,
        stateless,
    )

    names = [shard["name"] for shard in manifest.split("train")["shards"]]
    before = {path.name: path.read_bytes() for path in manifest.folder.iterdir()}
    parts = prepare_for_energon(manifest.folder, names)
    assert parts == {name for _, members in ours(manifest) for name in members}
    counts = json.loads((manifest.folder / ".nv-meta" / ".info.json").read_text())["shard_counts"]
    unit = "blocks" if manifest.kind == "text" else "samples"
    assert counts == {shard["name"]: shard[unit] for shard in manifest.split("train")["shards"]}

    @stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return dict(sample)

    class Encoder(DefaultTaskEncoder):
        cookers = (Cooker(cook),)
        decoder = None

    dataset = get_val_dataset(
        manifest.folder,
        split_part="train",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        task_encoder=Encoder(),
    )
    found = [(sample["__key__"], named(sample)) for sample in get_loader(dataset)]
    assert sorted(found) == sorted(ours(manifest))
    assert {n: (manifest.folder / n).read_bytes() for n in before} == before
    assert find_damage(manifest) == []


def test_energon_and_megatron_core_share_their_namespace() -> None:
    """Neither package owns ``megatron``: with one imported, the other is still found."""
    import megatron.energon

    core = importlib.util.find_spec("megatron.core")
    assert core is not None
    assert core.origin is not None
    assert Path(core.origin).parent.name == "core"
    assert getattr(megatron, "__file__", None) is None


def test_energon_indexes_both_splits_together(dataset: Path, tmp_path: Path) -> None:
    """It refuses keys that two shards share, so splits have keys of their own."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    manifest = Manifest.load(shutil.copytree(dataset, tmp_path / "both"))
    names = [shard["name"] for split in ("train", "validation") for shard in manifest.split(split)["shards"]]
    patterns = [("train", "train-.*"), ("val", "validation-.*")]
    BaseWebdatasetFactory.prepare_dataset(manifest.folder, names, split_parts_patterns=patterns, workers=1)
    counts = json.loads((manifest.folder / ".nv-meta" / ".info.json").read_text())["shard_counts"]
    assert set(counts) == set(names)
    assert any(name.startswith("validation") for name in names)
