"""Sources of media: one global order for any layout, the right content, and what happens to damaged samples."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_samples import caption, documents, encoded, jpeg, latent, picture, recording, wave, write_files
from PIL import Image

from data_pipeline.errors import DamagedDataError
from data_pipeline.fetch.storage import LocalStorage
from data_pipeline.loader import StepLoader, micro_batch_indices
from data_pipeline.media import plan as plan_module
from data_pipeline.media.config import ImageDataConfig, InterleavedDataConfig, LatentDataConfig
from data_pipeline.media.decode import ImageTransform, Limits, decode_image, transformed
from data_pipeline.media.packing import Modality
from data_pipeline.prepare.media.options import MediaOptions
from data_pipeline.prepare.media.prepare import prepare_media
from data_pipeline.store.manifest import Manifest

INTERLEAVED = {
    "sequence_length": 48,
    "image_tokens": 9,
    "image_size": 16,
    "image_id": 300,
    "image_start_id": 301,
    "image_end_id": 302,
    "speech_id": 303,
    "speech_rate": 16000,
}


def config_of(kind: str, path: Path, **options: Any) -> Any:
    if kind == "images":
        return ImageDataConfig(
            path=str(path), size=16, resize=18, crop="random", flip=True, caption_tokens=12, **options
        )
    if kind == "latents":
        return LatentDataConfig(path=str(path), **options)
    return InterleavedDataConfig(path=str(path), **{**INTERLEAVED, **options})


@pytest.fixture(params=["images", "latents", "interleaved"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kind: str, image_set: Path, latent_set: Path, document_set: Path) -> Path:
    return {"images": image_set, "latents": latent_set, "interleaved": document_set}[kind]


def rows_of(batch: dict[str, np.ndarray], count: int) -> list[dict[str, Any]]:
    """The rows of a batch one by one; spans go with their row."""
    rows = []
    for row in range(count):
        found: dict[str, Any] = {}
        for name, array in batch.items():
            if name in ("cu_seqlens", "max_seqlen", "image_spans", "speech_spans", "speech_frames", "speech"):
                continue
            if name == "images" and "image_spans" in batch:
                continue
            found[name] = array[row]
        for media, table in (("images", "image_spans"), ("speech", "speech_spans")):
            if table in batch:
                at = np.flatnonzero(batch[table][:, 0] == row)
                found[table] = batch[table][at, 1:]
                if media == "images":
                    found[media] = batch[media][at]
                else:
                    found[media] = [batch[media][n, : batch["speech_frames"][n]] for n in at]
        rows.append(found)
    return rows


def assert_equal(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, list):
                assert len(value) == len(other[name])
                for a, b in zip(value, other[name], strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=name)
            else:
                np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_one_global_sequence_for_every_layout(kind: str, folder: Path) -> None:
    steps, batch_size = 4, 8
    reference = config_of(kind, folder, workers=0).build(seed=5).train
    whole = rows_of(reference.batch(range(steps * batch_size)), steps * batch_size)
    for workers, ranks, micro in ((0, 4, 1), (1, 2, 4), (2, 1, 8), (3, 4, 2), (2, 2, 1)):
        rows: dict[int, dict[str, Any]] = {}
        for rank in range(ranks):
            source = config_of(kind, folder, workers=workers).build(seed=5).train
            assert source.fingerprint == reference.fingerprint
            for step in range(steps):
                for indices in micro_batch_indices(step, batch_size, micro, rank, ranks):
                    found = rows_of(source.batch(indices), len(indices))
                    rows.update(zip(indices, found, strict=True))
            source.close()
        assert_equal([rows[index] for index in range(steps * batch_size)], whole)


def test_a_row_depends_on_its_index_alone(kind: str, folder: Path) -> None:
    whole = rows_of(config_of(kind, folder).build(seed=5).train.batch(range(120)), 120)
    late = config_of(kind, folder).build(seed=5).train
    indices = [117, 3, 60, 61, 2, 119, 60]
    assert_equal(rows_of(late.batch(indices), len(indices)), [whole[index] for index in indices])
    other = rows_of(config_of(kind, folder).build(seed=6).train.batch(range(120)), 120)
    name = "tokens" if kind == "interleaved" else kind
    assert any((a[name] != b[name]).any() for a, b in zip(whole, other, strict=True))


def test_each_sample_comes_once_an_epoch(kind: str, folder: Path) -> None:
    source = config_of(kind, folder).build(seed=5).train
    assert source.num_lanes > 1
    seen: dict[int, Counter[Any]] = {0: Counter(), 1: Counter()}
    for lane in range(source.num_lanes):
        index = lane
        while (origins := source.provenance(index))[0]["epoch"] < 2:
            parts = ((o["key"], o.get("first_element"), o.get("positions")) for o in origins)
            seen[origins[0]["epoch"]].update(parts)
            index += source.num_lanes
    assert seen[0] == seen[1]
    assert set(seen[0].values()) == {1}
    stored = {sample.key for sample in Manifest.load(folder).samples("train")}
    assert {key for key, _, _ in seen[0]} == stored
    assert source.rows_per_epoch == (len(stored) if kind != "interleaved" else source.rows_per_epoch)


def test_validation_is_every_sample_once_in_stored_order(kind: str, folder: Path) -> None:
    source = config_of(kind, folder).build(seed=5).validation
    keys = [origin["key"] for index in range(source.num_samples) for origin in source.provenance(index)]
    stored = [sample.key for sample in Manifest.load(folder).samples("validation")]
    assert sorted(set(keys)) == stored
    if kind != "interleaved":
        assert keys == stored
    with pytest.raises(IndexError):
        source.batch([source.num_samples])


def test_images_and_captions_are_those_of_the_files(image_set: Path, image_source: Path, tokenizer_file: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    config = ImageDataConfig(path=str(image_set), size=24, caption_tokens=12)
    source = config.build(seed=2).train
    batch = source.batch(range(20))
    kinds = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert kinds == {
        "images": ("uint8", (20, 24, 24, 3)),
        "caption_tokens": ("int32", (20, 12)),
        "caption_mask": ("bool", (20, 12)),
        "sample_mask": ("bool", (20,)),
    }
    for row in range(20):
        (origin,) = source.provenance(row)
        raw = (image_source / f"{origin['source']}.jpg").read_bytes()
        np.testing.assert_array_equal(batch["images"][row], transformed(raw, ImageTransform(size=24), Limits()))
        text = (image_source / f"{origin['source']}.txt").read_text()
        assert source.captions([row]) == [text]
        expected = [0, *tokenizer.encode(text).ids, 1][:12]
        assert batch["caption_tokens"][row, : len(expected)].tolist() == expected
        assert batch["caption_mask"][row].tolist() == [True] * len(expected) + [False] * (12 - len(expected))
    first = ImageDataConfig(path=str(image_set), size=24, channels_first=True).build(seed=2).train.batch(range(4))
    np.testing.assert_array_equal(first["images"], batch["images"][:4].transpose(0, 3, 1, 2))


def test_random_crops_change_from_epoch_to_epoch_but_not_with_the_layout(image_set: Path) -> None:
    source = config_of("images", image_set).build(seed=2).train
    visits: dict[str, list[bytes]] = {}
    for index in range(3 * source.rows_per_epoch):
        key = source.provenance(index)[0]["key"]
        visits.setdefault(key, []).append(source.batch([index])["images"].tobytes())
    assert sum(len(set(looks)) > 1 for looks in visits.values()) > 0.8 * len(visits)


def test_latents_come_with_their_conditioning(latent_set: Path) -> None:
    source = LatentDataConfig(path=str(latent_set)).build(seed=1).train
    batch = source.batch(range(10))
    for row, label in enumerate(batch["labels"].tolist()):
        assert source.provenance(row)[0]["source"] == f"{label:04d}"
        np.testing.assert_array_equal(batch["latents"][row], latent(label))
        length = label % 5 + 1
        assert batch["conditioning_mask"][row].tolist() == [True] * length + [False] * (5 - length)
        assert (batch["conditioning"][row, :length] == label).all()
        assert not batch["conditioning"][row, length:].any()
    assert batch["latents"].dtype == np.float32
    assert batch["conditioning"].dtype == np.float16
    short = LatentDataConfig(path=str(latent_set), conditioning_tokens=2).build(seed=1).train.batch(range(10))
    np.testing.assert_array_equal(short["conditioning"], batch["conditioning"][:, :2])


@pytest.mark.parametrize("markers", [True, False])
def test_rows_hold_the_documents(document_set: Path, document_source: Path, markers: bool) -> None:
    """Every row against the documents themselves, rebuilt from the source files with the tokenizer alone."""
    from tokenizers import Tokenizer

    ids = {} if markers else {"image_start_id": None, "image_end_id": None}
    config = config_of("interleaved", document_set, **ids)
    tokenizer = Tokenizer.from_file(str(document_set / "tokenizer.json"))
    source = config.build(seed=4).train
    documents = {
        f"documents.jsonl:{number}": _elements(json.loads(line)["segments"], tokenizer, config, document_source.parent)
        for number, line in enumerate(document_source.read_text().splitlines(), start=1)
    }
    covered: Counter[tuple[str, int]] = Counter()
    epoch_rows = [
        index
        for lane in range(source.num_lanes)
        for index in range(lane, 40 * source.rows_per_epoch, source.num_lanes)[: source.rows_per_epoch * 2]
        if source.provenance(index)[0]["epoch"] == 0
    ]
    assert len(epoch_rows) == source.rows_per_epoch
    used = 0
    for index in epoch_rows:
        row = rows_of(source.batch([index]), 1)[0]
        at = 0
        pixels, sounds = list(row["images"]), list(row["speech"])
        spans = {Modality.IMAGE: row["image_spans"].tolist(), Modality.SPEECH: row["speech_spans"].tolist()}
        for number, origin in enumerate(source.provenance(index)):
            elements = documents[origin["source"]]
            first, length = origin["first_element"], origin["positions"]
            piece = elements[first : first + length + 1]
            inputs, targets = piece[:-1], piece[1:]
            end = at + length
            assert row["tokens"][at:end].tolist() == [element[0] for element in inputs]
            assert row["targets"][at:end].tolist() == [element[0] for element in targets]
            assert row["modality_ids"][at:end].tolist() == [element[1] for element in inputs]
            assert (row["seq_idx"][at:end] == number).all()
            assert row["position_ids"][at:end].tolist() == list(range(length))
            assert row["loss_mask"][at:end].tolist() == [element[1] == Modality.TEXT for element in targets]
            known = [element[1] for element in targets]
            if known[-1] != Modality.TEXT:
                known[-1] = Modality.PADDING
            assert row["target_modality_ids"][at:end].tolist() == known
            covered.update((origin["source"], first + 1 + n) for n, e in enumerate(targets) if e[1] == Modality.TEXT)
            for offset, (_, modality, payload, place) in enumerate(inputs):
                if modality == Modality.TEXT or place != 0:
                    continue
                start, count = spans[modality].pop(0)
                assert start == at + offset
                assert [e[2] is payload for e in inputs[offset : offset + count]] == [True] * count
                if modality == Modality.IMAGE:
                    assert count == 9
                    expected = transformed(payload, ImageTransform(size=16), Limits())
                    np.testing.assert_array_equal(pixels.pop(0), expected)
                else:
                    assert len(sounds.pop(0)) == 2 * len(wave_of(payload))
            at = end
        assert not pixels
        assert not sounds
        assert not spans[Modality.IMAGE]
        assert not spans[Modality.SPEECH]
        assert (row["modality_ids"][at:] == Modality.PADDING).all()
        assert not row["loss_mask"][at:].any()
        used += at
    assert used / (len(epoch_rows) * 48) == pytest.approx(source.fill)
    train = {sample.attributes["source"] for sample in Manifest.load(document_set).samples("train")}
    expected_targets = Counter(
        (name, n) for name in train for n, e in enumerate(documents[name]) if n and e[1] == Modality.TEXT
    )
    assert covered == expected_targets


def wave_of(payload: bytes) -> np.ndarray:
    import soundfile

    return np.asarray(soundfile.read(io.BytesIO(payload))[0])


def _elements(segments: list[dict[str, str]], tokenizer: Any, config: Any, root: Path) -> list[tuple[Any, ...]]:
    """(id, modality, payload, place in the span) of every element of a document."""
    elements: list[tuple[Any, ...]] = [(0, Modality.TEXT, None, 0)]
    for segment in segments:
        if segment["type"] == "text":
            elements += [(token, Modality.TEXT, None, 0) for token in tokenizer.encode(segment["text"]).ids]
            continue
        payload = (root / segment["path"]).read_bytes()
        if segment["type"] == "image":
            count, fill, modality = config.image_tokens, config.image_id, Modality.IMAGE
            start, end = config.image_start_id, config.image_end_id
        else:
            count = -(-len(wave_of(payload)) * 25 // 8000)
            fill, modality, start, end = config.speech_id, Modality.SPEECH, None, None
        elements += [] if start is None else [(start, Modality.TEXT, None, 0)]
        elements += [(fill, modality, payload, place) for place in range(count)]
        elements += [] if end is None else [(end, Modality.TEXT, None, 0)]
    return [*elements, (1, Modality.TEXT, None, 0)]


def flip(folder: Path, split: str, number: int, extension: str) -> tuple[str, str]:
    """Damage one member; returns the shard's name and the sample's key."""
    sample = Manifest.load(folder).samples(split)[number]
    member = sample.members[extension]
    with open(folder / sample.shard, "r+b") as stream:
        stream.seek(member["offset"] + member["length"] // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 4]))
    return sample.shard, sample.key


EXTENSION = {"images": "jpg", "latents": "lat.npy", "interleaved": "tok.npy"}


def test_damage_stops_and_names_shard_member_and_byte(kind: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shard, key = flip(copy, "train", 7, EXTENSION[kind])
    source = config_of(kind, copy, workers=2).build(seed=5).train
    with pytest.raises(DamagedDataError, match=rf"{shard}: byte \d+: member {key}.*hash.*What to do") as caught:
        source.batch(range(2 * source.rows_per_epoch))
    assert caught.value.shard == shard
    assert caught.value.member == f"{key}.{EXTENSION[kind]}"
    assert caught.value.byte is not None


def test_substitutes_take_exactly_the_lost_rows_and_always_the_same(kind: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    bad = {flip(copy, "train", number, EXTENSION[kind])[1] for number in (7, 8, 20)}
    count = 2 * config_of(kind, folder).build(seed=5).train.rows_per_epoch
    sound = config_of(kind, folder).build(seed=5).train
    whole = rows_of(sound.batch(range(count)), count)
    lost = [bool(bad & {origin["key"] for origin in sound.provenance(index)}) for index in range(count)]
    assert 0 < sum(lost) < count
    source = config_of(kind, copy, on_damage="substitute", workers=2).build(seed=5).train
    batch = source.batch(range(count))
    assert batch.pop("substituted").tolist() == lost
    rows = rows_of(batch, count)
    assert_equal([rows[i] for i in range(count) if not lost[i]], [whole[i] for i in range(count) if not lost[i]])
    assert {entry["member"] for entry in source.bad_data.entries} == {f"{key}.{EXTENSION[kind]}" for key in bad}
    for index in np.flatnonzero(lost).tolist():
        origins = source.provenance(index)
        assert all(origin["substitutes"] for origin in origins)
        assert not bad & {origin["key"] for origin in origins}
    again = config_of(kind, copy, on_damage="substitute", workers=0).build(seed=5).train
    late = list(range(count - 1, -1, -1))
    batch = again.batch(late)
    del batch["substituted"]
    assert_equal(rows_of(batch, count)[::-1], rows)


def test_a_lost_sidecar_is_damage_of_its_whole_shard(image_set: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(image_set, tmp_path / "copy"))
    config = config_of("images", copy, on_damage="substitute")
    config.build(seed=5).train.batch([0])  # leaves the plan
    shard = Manifest.load(copy).split("train")["shards"][1]["name"]
    (copy / shard.replace(".tar", ".json")).write_text("{}")
    with pytest.raises(DamagedDataError, match="does not match its hash"):
        config_of("images", copy).build(seed=5).train.batch(range(48))
    source = config.build(seed=5).train
    batch = source.batch(range(48))
    sound = config_of("images", image_set).build(seed=5).train
    lost = [sound.provenance(index)[0]["shard"] == shard for index in range(48)]
    assert batch["substituted"].tolist() == lost
    np.testing.assert_array_equal(batch["images"][~np.array(lost)], sound.batch(range(48))["images"][~np.array(lost)])


def test_all_damaged_is_an_error_also_when_substituting(latent_set: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(latent_set, tmp_path / "copy"))
    for number in range(len(Manifest.load(copy).samples("train"))):
        flip(copy, "train", number, "lat.npy")
    source = config_of("latents", copy, on_damage="substitute").build(seed=5).train
    with pytest.raises(DamagedDataError, match="substitutes in a row are damaged too"):
        source.batch([0])


class _Far(LocalStorage):
    """A folder that looks remote: it has no local path, and counts what is read."""

    def __init__(self, folder: Path) -> None:
        self.inner = LocalStorage(folder)
        self.url = f"s3://bucket/{folder.name}"
        self.reads: list[tuple[str, int]] = []

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self.reads.append((name, start))
        return self.inner.read(name, start, length)

    def size(self, name: str) -> int:
        return self.inner.size(name)

    def close(self) -> None:
        pass


class Far:
    """:class:`_Far` without being a ``LocalStorage``."""

    def __init__(self, folder: Path) -> None:
        self._inner = _Far(folder)
        self.url, self.reads = self._inner.url, self._inner.reads
        self.read, self.size, self.close = self._inner.read, self._inner.size, self._inner.close


def test_a_remote_set_gives_the_same_batches_through_the_cache(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data_pipeline.fetch.storage as storage_module
    from data_pipeline.config_common import FetchConfig

    local = config_of(kind, folder).build(seed=5).train
    expected = rows_of(local.batch(range(60)), 60)
    far = Far(folder)
    monkeypatch.setattr(storage_module, "open_storage", lambda *_: far)
    remote = config_of(kind, folder, fetch=FetchConfig(cache_folder=str(tmp_path / "cache"))).build(seed=5).train
    assert remote.fingerprint == local.fingerprint
    rows: list[dict[str, Any]] = []
    for step in range(6):
        rows += rows_of(remote.batch(range(10 * step, 10 * step + 10)), 10)
    remote.close()
    assert_equal(rows, expected)
    tars = [read for read in far.reads if read[0].endswith(".tar")]
    assert tars
    assert len(tars) == len(set(tars))  # each segment was fetched once, whole


def test_plan_is_cached_and_a_torn_cache_is_only_a_miss(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("plan_*")))
    expected = rows_of(config_of(kind, copy).build(seed=5).train.batch(range(10)), 10)
    for cache in copy.glob("plan_*.npz"):
        cache.write_bytes(cache.read_bytes()[:70])
    assert_equal(rows_of(config_of(kind, copy).build(seed=5).train.batch(range(10)), 10), expected)
    monkeypatch.setattr(plan_module, "segments_of", lambda *_: pytest.fail("planned again"))
    assert_equal(rows_of(config_of(kind, copy).build(seed=5).train.batch(range(10)), 10), expected)
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_indexed_shards_of_others_are_read(tmp_path: Path) -> None:
    import webdataset

    from data_pipeline.store.indexing import IndexOptions, index_folder

    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for number in range(8 * shard, 8 * shard + 8):
                raw = encoded(picture(number), "PNG") if number % 2 else jpeg(number)
                extension = "png" if number % 2 else "jpg"
                writer.write({"__key__": f"k{number}", extension: raw, "txt": caption(number)})
    for kind in ("foreign", "images"):
        options = IndexOptions(kind=kind, optional=("png", "jpg"))
        index_folder(folder, options, workers=1, force=True)
        config = ImageDataConfig(path=str(folder), size=20)
        assert list(config.violations()) == []
        source = config.build(seed=1).train
        batch = source.batch(range(24))
        for row in range(24):
            number = int(source.provenance(row)[0]["key"][1:])
            raw = encoded(picture(number), "PNG") if number % 2 else jpeg(number)
            np.testing.assert_array_equal(batch["images"][row], transformed(raw, ImageTransform(size=20), Limits()))
            assert source.captions([row]) == [caption(number)]


def test_fingerprint_covers_what_the_rows_depend_on(image_set: Path) -> None:
    def fingerprint(seed: int = 1, **options: Any) -> str:
        given = {"size": 16, **options}
        return str(ImageDataConfig(path=str(image_set), **given).build(seed=seed).train.fingerprint)

    assert fingerprint() == fingerprint(workers=3)
    others = [fingerprint(seed=2), fingerprint(size=17), fingerprint(flip=True), fingerprint(num_lanes=2)]
    others += [fingerprint(segment_bytes=5000), fingerprint(caption_tokens=4)]
    assert len({fingerprint(), *others}) == 7


def test_small_segments_are_joined_where_rows_are_long(tmp_path: Path) -> None:
    source = documents(300, tmp_path / "source")
    options = MediaOptions(kind="interleaved", vocab_size=300, validation_fraction=0.0)
    manifest = prepare_media([source], tmp_path / "out", options, workers=1).manifest
    assert manifest is not None
    recommended = manifest.content["num_lanes"]
    long = config_of("interleaved", tmp_path / "out", sequence_length=256).build(seed=1).train
    given = {"num_lanes": recommended, "sequence_length": 256}
    fixed = config_of("interleaved", tmp_path / "out", **given).build(seed=1).train
    assert fixed.num_lanes == recommended > long.num_lanes == 4
    assert long.fill > fixed.fill + 0.05


def test_configs_report_all_violations(image_set: Path, document_set: Path, tmp_path: Path) -> None:
    def fields(config: Any) -> set[str]:
        return {field for field, *_ in config.violations()}

    wrong = ImageDataConfig(path=str(tmp_path), size=0, crop="corner", workers=-1, num_lanes=0)  # type: ignore[arg-type]
    assert fields(wrong) == {"size", "crop", "workers", "num_lanes", "path"}
    assert fields(ImageDataConfig(path=str(image_set), size=16, resize=8, num_lanes=10**6)) == {"resize", "num_lanes"}
    other = ImageDataConfig(path=str(document_set), size=16)
    ((field, _, rule, _),) = other.violations()
    assert field == "path"
    assert "of kind interleaved, expected images or foreign" in rule
    assert fields(config_of("interleaved", document_set)) == set()
    assert config_of("interleaved", document_set).vocab_size == 304
    crowded = config_of("interleaved", document_set, image_tokens=47, speech_tokens_per_second=1000.0)
    assert fields(crowded) == {"image_tokens", "speech_tokens_per_second"}
    with pytest.raises(ValueError, match="an image takes 49 positions with its markers, but a row has 48"):
        crowded.build(seed=1)
    assert fields(config_of("interleaved", document_set, image_id=-1, sequence_length=1)) >= {
        "image_id",
        "sequence_length",
    }


def test_limits_hold_when_reading_too(image_set: Path) -> None:
    with pytest.raises(DamagedDataError, match=r"more than the 200 allowed.*raise max_pixels"):
        ImageDataConfig(path=str(image_set), size=8, max_pixels=200).build(seed=0).train.batch([0])


def test_limits_may_be_raised_in_a_continued_run_for_they_decide_no_order(kind: str, folder: Path) -> None:
    config = config_of(kind, folder)
    extendable = {f.name for f in dataclasses.fields(config) if f.metadata.get("extendable")}
    assert {"max_pixels", "max_bytes"} <= extendable
    raised = dataclasses.replace(config, max_pixels=1 << 40, max_bytes=1 << 40)
    first, second = (c.build(seed=5).train for c in (config, raised))
    assert first.fingerprint == second.fingerprint
    assert_equal(rows_of(first.batch(range(12)), 12), rows_of(second.batch(range(12)), 12))


def test_verify_finds_the_sets_sound_and_names_damage(kind: str, folder: Path, tmp_path: Path) -> None:
    from data_pipeline.store.verify import find_damage

    assert find_damage(folder) == []
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shard, key = flip(copy, "train", 3, EXTENSION[kind])
    (fault,) = find_damage(copy)
    assert shard in fault
    assert key in fault


def test_captions_need_a_tokenizer(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", {"a.jpg": jpeg(1), "a.txt": b"x"})
    prepare_media([source], tmp_path / "out", MediaOptions(kind="images"), workers=1)
    config = ImageDataConfig(path=str(tmp_path / "out"), size=8, caption_tokens=4)
    assert [field for field, *_ in config.violations()] == ["caption_tokens"]
    assert (
        ImageDataConfig(path=str(tmp_path / "out"), size=8).build(seed=0).train.batch([0, 1, 2])["images"].shape[0] == 3
    )


def test_loader_hands_out_the_same_steps(image_set: Path) -> None:
    config = config_of("images", image_set, workers=2)
    whole = config.build(seed=5).train.batch(range(24))["images"]
    with StepLoader(config.build(seed=5).train, 8, 4, 1, 2, start_step=1) as loader:
        for step in (1, 2):
            (batch,) = next(loader)
            np.testing.assert_array_equal(batch["images"], whole[8 * step + 4 : 8 * step + 8])


@pytest.mark.parametrize("present", [0, 1, 3])
def test_padding_is_blank_and_masked(kind: str, folder: Path, present: int) -> None:
    source = config_of(kind, folder, workers=0).build(seed=5).train
    whole, padded = source.batch(range(4)), source.padded_batch(range(4), present)
    assert padded.keys() == whole.keys()
    assert padded["sample_mask"].tolist() == [row < present for row in range(4)]
    assert_equal(rows_of(padded, 4)[:present], [{**row, "sample_mask": True} for row in rows_of(whole, 4)[:present]])
    for row in rows_of(padded, 4)[present:]:
        for name, value in row.items():
            blank = -1 if name in ("seq_idx", "modality_ids", "target_modality_ids") else 0
            assert all(not len(part) for part in value) if isinstance(value, list) else (value == blank).all(), name
    assert {name: array.dtype for name, array in padded.items()} == {n: array.dtype for n, array in whole.items()}


def test_loader_pads_the_end_of_validation(kind: str, folder: Path) -> None:
    source = config_of(kind, folder, workers=0).build(seed=5).validation
    seen = []
    for rank in range(2):
        with StepLoader(source, 8, 4, rank, 2) as loader:
            for (batch,) in loader:
                seen += batch["sample_ids"][batch["sample_mask"]].tolist()
    assert sorted(seen) == list(range(source.num_samples))


def test_grey_png_in_a_document_and_wav(tmp_path: Path) -> None:
    """Media in other formats than usual come out as RGB and mono."""
    grey = io.BytesIO()
    Image.fromarray(picture(1)[:, :, 0]).save(grey, "PNG")
    write_files(tmp_path / "s", {"a.png": grey.getvalue(), "b.wav": recording(wave(1), form="WAV")})
    segments = [{"type": "image", "path": "a.png"}, {"type": "speech", "path": "b.wav"}]
    (tmp_path / "s" / "d.jsonl").write_text(json.dumps({"segments": segments}))
    options = MediaOptions(kind="interleaved", vocab_size=258)
    prepare_media([tmp_path / "s" / "d.jsonl"], tmp_path / "out", options, workers=1)
    batch = config_of("interleaved", tmp_path / "out", speech_rate=8000).build(seed=0).train.batch([0])
    expected = transformed(grey.getvalue(), ImageTransform(size=16), Limits())
    np.testing.assert_array_equal(batch["images"][0], expected)
    assert (decode_image(grey.getvalue(), Limits())[:, :, 0] == picture(1)[:, :, 0]).all()
    np.testing.assert_allclose(batch["speech"][0], wave(1), atol=1e-4)
    assert batch["loss_mask"].sum() == batch["modality_ids"][batch["modality_ids"] == 0].size
