"""One global sequence, whoever reads it: ranks, workers, micro-batches, resumes, mixing, packing, substitution."""

from __future__ import annotations

import shutil
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_text import append_documents, write_dataset
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from data_pipeline.config import TextDataConfig
from data_pipeline.config_common import AppendedConfig
from data_pipeline.errors import DamagedDataError
from data_pipeline.loader import StepLoader, check_loader_state, loader_state
from data_pipeline.mixed_config import MixedAppendedConfig, MixedTextConfig, PhaseConfig
from data_pipeline.source import SampleSource
from data_pipeline.store.manifest import TOKENS_EXTENSION, Manifest
from data_pipeline.store.reader import BlockReader
from data_pipeline.text_source import TextSource
from data_pipeline.torch_dataset import MicroBatchDataset

SEED = 11
S = 32
Config = TextDataConfig | MixedTextConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datasets ``large`` and ``small`` (fewer segments than lanes), and ``damaged``: a copy of ``large`` with flipped
    bits in the tokens of one block and in the offsets of another."""
    root = tmp_path_factory.mktemp("exact")
    large = write_dataset(root / "large", 400, 1, num_lanes=8)
    small = write_dataset(root / "small", 30, 2, num_lanes=2)
    folders = {"large": large, "small": small, "damaged": large}
    for config in configurations(folders).values():
        config.build(SEED)  # plans are made of sound offsets, and kept beside the data
    damaged = Path(shutil.copytree(large, root / "damaged"))
    blocks = Manifest.load(damaged).blocks("train")
    flip(damaged, blocks[3], TOKENS_EXTENSION)
    flip(damaged, blocks[12], "off.npy")
    return {**folders, "damaged": damaged}


def flip(folder: Path, block: Any, extension: str) -> None:
    entry = block.members[extension]
    with open(folder / block.shard, "r+b") as stream:
        stream.seek(entry["offset"] + entry["length"] - 5)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 4]))


def configurations(folders: dict[str, Path]) -> dict[str, Config]:
    phases = (
        PhaseConfig(from_sample=0, weights={"large": 3.0, "small": 1.0}),
        PhaseConfig(from_sample=100, weights={"large": 1.0, "small": 1.0}),
        PhaseConfig(from_sample=170, weights={"large": 1.0}),
    )
    sources = {name: str(folders[name]) for name in ("large", "small")}
    plain = TextDataConfig(path=sources["large"], sequence_length=S)
    return {
        "best_fit": plain,
        "concatenate": replace(plain, packing="concatenate"),
        "reserve": replace(plain, reserve_segments=3),
        "substitute": replace(plain, path=str(folders["damaged"]), on_damage="substitute"),
        "substitute_reserve": replace(plain, path=str(folders["damaged"]), on_damage="substitute", reserve_segments=3),
        "mixed": MixedTextConfig(sources=sources, phases=phases, sequence_length=S),
        "mixed_substitute": MixedTextConfig(
            sources={**sources, "large": str(folders["damaged"])},
            weights={"large": 1.0, "small": 2.0},
            sequence_length=S,
            on_damage="substitute",
        ),
    }


NAMES = list(configurations({name: Path(name) for name in ("large", "small", "damaged")}))


def open_train(config: Config) -> SampleSource:
    return config.build(SEED).train


def ids(source: SampleSource, index: int) -> tuple[Any, ...]:
    """Provenance of a row, as something that can be compared and counted."""
    return tuple(
        (piece.get("source"), piece["shard"], piece["member"], piece["document"], piece["first_token"])
        for piece in source.provenance(index)
    )


_WHOLE: dict[str, tuple[np.ndarray, list[tuple[Any, ...]]]] = {}


def whole(name: str, config: Config, n: int = 480) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    """Tokens [n, S] and provenance of the first ``n`` samples, read by one rank in one go."""
    if name not in _WHOLE:
        source = open_train(config)
        _WHOLE[name] = source.batch(range(n))["tokens"], [ids(source, index) for index in range(n)]
    return _WHOLE[name]


def read_steps(config: Config, start: int, steps: int, global_batch: int, micro_batch: int, dp_size: int) -> np.ndarray:
    """Tokens of ``steps`` global batches from sample ``start`` on, as all ranks together read them."""
    parts: dict[int, np.ndarray] = {}
    for rank in range(dp_size):
        loader = StepLoader(
            open_train(config), global_batch, micro_batch, rank, dp_size, start_step=start // global_batch
        )
        with loader:
            for _ in range(steps):
                for batch in next(loader):
                    parts.update(zip(batch["sample_ids"].tolist(), batch["tokens"], strict=True))
    assert sorted(parts) == list(range(start, start + steps * global_batch))
    return np.array([parts[index] for index in sorted(parts)])


def read_workers(config: Config, start: int, count: int, layout: tuple[int, int, int], workers: int) -> np.ndarray:
    """As :func:`read_steps`, through torch's DataLoader with ``workers`` processes a rank."""
    global_batch, micro_batch, dp_size = layout
    parts: dict[int, np.ndarray] = {}
    for rank in range(dp_size):
        dataset = MicroBatchDataset(
            lambda: open_train(config),
            global_batch=global_batch,
            micro_batch=micro_batch,
            dp_rank=rank,
            dp_size=dp_size,
            start_sample=start,
        )
        batches = iter(DataLoader(dataset, batch_size=None, num_workers=workers))
        for _ in range(count // (micro_batch * dp_size)):
            batch = next(batches)
            parts.update(zip(batch["sample_ids"].tolist(), batch["tokens"].numpy(), strict=True))
    assert sorted(parts) == list(range(start, start + count))
    return np.array([parts[index] for index in sorted(parts)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [(24, 1, 1), (24, 4, 2), (24, 1, 3), (24, 2, 4), (24, 3, 8), (8, 8, 1)])
def test_ranks_and_micro_batches_read_one_sequence(
    folders: dict[str, Path], name: str, layout: tuple[int, int, int]
) -> None:
    config = configurations(folders)[name]
    np.testing.assert_array_equal(read_steps(config, 0, 5, *layout), whole(name, config)[0][: 5 * layout[0]])


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_read_one_sequence(folders: dict[str, Path], workers: int) -> None:
    name, layout = ("mixed", (16, 2, 2)) if workers % 2 else ("substitute", (16, 4, 1))
    config = configurations(folders)[name]
    np.testing.assert_array_equal(read_workers(config, 32, 48, layout, workers), whole(name, config)[0][32:80])


layouts = st.sampled_from([(6, 1, 1), (6, 3, 2), (6, 2, 3), (8, 2, 4), (8, 1, 8), (12, 4, 1), (24, 3, 8), (16, 16, 1)])


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(NAMES), runs=st.lists(st.tuples(layouts, st.integers(1, 4)), min_size=2, max_size=4))
def test_resuming_again_and_again_on_other_layouts_continues_the_sequence(
    folders: dict[str, Path], name: str, runs: list[tuple[tuple[int, int, int], int]]
) -> None:
    """stream(0..n) = stream(0..k) + resume(k..n), also after a change of ranks and batch size."""
    config = configurations(folders)[name]
    expected = whole(name, config)[0]
    at = 0
    for layout, steps in runs:
        at += -at % layout[0] if at % layout[0] else 0  # a step begins at a multiple of its global batch
        read = read_steps(config, at, steps, *layout)
        np.testing.assert_array_equal(read, expected[at : at + len(read)])
        at += len(read)


@pytest.mark.parametrize("name", ["best_fit", "concatenate", "reserve"])
def test_resume_at_the_edge_of_an_epoch(folders: dict[str, Path], name: str) -> None:
    config = configurations(folders)[name]
    source = open_train(config)
    edge = next(index for index in range(10_000) if source.provenance(index)[0]["epoch"] == 1)
    expected = source.batch(range(edge - 12, edge + 12))["tokens"]
    for start in (edge - 1, edge, edge + 1):
        resumed = open_train(config).batch(range(start, edge + 12))["tokens"]
        np.testing.assert_array_equal(resumed, expected[start - edge + 12 :])


@pytest.mark.parametrize("name", ["best_fit", "concatenate", "mixed"])
def test_each_epoch_holds_every_document_piece_once(folders: dict[str, Path], name: str) -> None:
    config = configurations(folders)[name]
    if isinstance(config, MixedTextConfig):
        config = replace(config, phases=config.phases[:1])  # the others end with one source alone
    source = open_train(config)
    seen: dict[tuple[str | None, int], Counter] = {}
    tokens: dict[tuple[str | None, int], int] = {}
    for index in range(2400):
        for piece in source.provenance(index):
            key = piece.get("source"), piece["epoch"]
            place = piece["shard"], piece["member"], piece["document"], piece["first_token"]
            seen.setdefault(key, Counter())[place] += 1
            tokens[key] = tokens.get(key, 0) + piece["positions"]
    for dataset in ("large", "small") if name == "mixed" else ("large",):
        train = Manifest.load(folders[dataset]).split("train")
        key = (dataset if name == "mixed" else None, 0)
        assert set(seen[key].values()) == {1}
        assert tokens[key] == train["tokens"] - train["documents"]


def test_stateful_data_loader_goes_on_where_it_was(folders: dict[str, Path]) -> None:
    config = configurations(folders)["mixed"]

    def loader() -> StatefulDataLoader:
        dataset = MicroBatchDataset(lambda: open_train(config), global_batch=8, micro_batch=2)
        return StatefulDataLoader(dataset, batch_size=None, num_workers=2)

    first = loader()
    batches = iter(first)
    read = [next(batches)["tokens"].numpy() for _ in range(7)]
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    batches = iter(second)
    read += [next(batches)["tokens"].numpy() for _ in range(9)]
    np.testing.assert_array_equal(np.concatenate(read), whole("mixed", config)[0][:32])


def test_state_of_another_loader_layout_is_refused(folders: dict[str, Path]) -> None:
    config = configurations(folders)["best_fit"]

    def dataset(**layout: int) -> MicroBatchDataset:
        return MicroBatchDataset(lambda: open_train(config), **layout)

    begun = dataset(global_batch=8, micro_batch=2, start_sample=16)
    fresh = dataset(global_batch=8, micro_batch=2)
    fresh.load_state_dict(begun.state_dict())  # before its first item
    np.testing.assert_array_equal(next(iter(fresh))["sample_ids"], [16, 17])
    for other in ({"global_batch": 16, "micro_batch": 8}, {"global_batch": 8, "micro_batch": 2, "dp_size": 2}):
        with pytest.raises(ValueError, match="keep the layout"):
            dataset(**other).load_state_dict(begun.state_dict())


def test_memory_of_a_batch_that_is_held_is_not_used_again(folders: dict[str, Path]) -> None:
    source = open_train(configurations(folders)["best_fit"])
    held = [source.lean(range(first, first + 4))["tokens"][1:] for first in range(0, 200, 4)]
    copies = [array.copy() for array in held]
    for first in range(0, 400, 4):
        source.lean(range(first, first + 4))
    for array, copy in zip(held, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_state_is_small_and_equal_on_all_ranks(folders: dict[str, Path]) -> None:
    import json

    config = configurations(folders)["mixed"]
    states = []
    for rank in range(3):
        with StepLoader(open_train(config), 24, 4, rank, 3, start_step=10**7) as loader:
            next(loader)
            states.append(json.dumps(loader.state_dict()))
    assert len(set(states)) == 1
    assert len(states[0]) < 1024


# ---- damage ----------------------------------------------------------------------------------------------------


def damaged_targets(folders: dict[str, Path]) -> tuple[list[Any], set[tuple[str, str]]]:
    blocks = Manifest.load(folders["damaged"]).blocks("train")
    return blocks, {(blocks[number].shard, f"{blocks[number].key}.{TOKENS_EXTENSION}") for number in (3, 12)}


@pytest.mark.parametrize("name", ["substitute", "substitute_reserve"])
def test_substitution_changes_damaged_rows_only(folders: dict[str, Path], name: str) -> None:
    config = configurations(folders)[name]
    sound = replace(config, path=str(folders["large"]))
    source = open_train(config)
    expected, got = open_train(sound), source.batch(range(480))
    before, reference = expected.batch(range(480)), open_train(replace(sound, on_damage="stop"))
    _, damaged = damaged_targets(folders)
    substituted = 0
    for index in range(480):
        places = {(piece["shard"], piece["member"]) for piece in reference.provenance(index)}
        if got["substituted"][index]:
            substituted += 1
            assert not places.isdisjoint(damaged)
            read = source.provenance(index)
            assert all(piece["substitutes"] for piece in read)
            assert {(piece["shard"], piece["member"]) for piece in read}.isdisjoint(damaged)
        else:
            assert places.isdisjoint(damaged)
            np.testing.assert_array_equal(got["tokens"][index], before["tokens"][index])
            np.testing.assert_array_equal(got["position_ids"][index], before["position_ids"][index])
    assert 0 < substituted < 100
    found = {(entry["shard"], entry["member"]) for entry in source.bad_data.entries}
    blocks, _ = damaged_targets(folders)
    assert found == {(blocks[3].shard, f"{blocks[3].key}.tok.npy"), (blocks[12].shard, f"{blocks[12].key}.off.npy")}


def test_reserved_segments_are_read_for_lost_rows_only(folders: dict[str, Path]) -> None:
    config = configurations(folders)["substitute_reserve"]
    source = open_train(config)
    got = source.batch(range(480))["substituted"]
    normal = {p["member"] for index in range(480) if not got[index] for p in source.provenance(index)}
    spare = {p["member"] for index in range(480) if got[index] for p in source.provenance(index)}
    assert spare
    assert normal.isdisjoint(spare)


def test_damage_stops_by_default_and_names_shard_member_byte_and_remedy(folders: dict[str, Path]) -> None:
    config = replace(configurations(folders)["best_fit"], path=str(folders["damaged"]))
    messages = set()
    for dp_size in (1, 2):
        for rank in range(dp_size):
            with StepLoader(open_train(config), 8, 4, rank, dp_size) as loader:
                with pytest.raises(DamagedDataError) as caught:
                    deque(loader, maxlen=0)
                messages.add(str(caught.value))
                assert str(caught.value.member) in str(caught.value)
    for message in messages:
        assert "train-00000" in message
        assert "byte" in message
        assert "What to do" in message


@pytest.mark.parametrize("extension", ["tok.npy", "off.npy"])
def test_rows_beside_a_lost_one_keep_their_provenance(tmp_path: Path, extension: str) -> None:
    """Segments of several blocks, one of them damaged: what each row says of itself is what is stored there."""
    folder = write_dataset(tmp_path / "data", 400, 3, num_lanes=1, block_tokens=100)
    config = TextDataConfig(path=str(folder), sequence_length=S, num_lanes=1, on_damage="substitute")
    config.build(SEED)
    blocks = Manifest.load(folder).blocks("train")
    reader = BlockReader(Manifest.load(folder), blocks)
    stored = {f"{block.key}.{TOKENS_EXTENSION}": reader.read(number) for number, block in enumerate(blocks)}
    flip(folder, blocks[7], extension)
    source = open_train(config)
    assert isinstance(source, TextSource)
    assert len(source._plan.blocks(0)) > 2
    batch = source.batch(range(source.rows_per_epoch))
    lost = batch["substituted"]
    assert lost.any()
    assert not lost.all()
    for index in range(source.rows_per_epoch):
        tokens: list[int] = []
        for piece in source.provenance(index):
            arrays = stored[piece["member"]]
            first = arrays.offsets[piece["document"]] + piece["first_token"]
            tokens += arrays.tokens[first : first + piece["positions"]].tolist()
            assert piece["substitutes"] == lost[index]
        assert batch["tokens"][index][batch["loss_mask"][index]].tolist() == tokens


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_missing_shard_is_substituted_also_after_a_restart(
    folders: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    folder = Path(shutil.copytree(folders["large"], tmp_path / "data"))
    config = replace(configurations(folders)["substitute"], path=str(folder))
    expected = open_train(config).batch(range(200))
    shard = folder / "train-000002.tar"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:3000])
    first = open_train(config)
    first.bad_data.keep(tmp_path / "quarantine", rank=0)
    batch = first.batch(range(200))
    lost = batch["substituted"]
    assert 0 < lost.sum() < 100
    np.testing.assert_array_equal(batch["tokens"][~lost], expected["tokens"][~lost])
    shutil.copy(folders["large"] / shard.name, shard)  # healed
    again = open_train(config)
    again.bad_data.keep(tmp_path / "quarantine", rank=1)
    np.testing.assert_array_equal(again.batch(range(200))["tokens"], batch["tokens"])
    shard.unlink()
    with pytest.raises(DamagedDataError, match=r"train-000002\.tar"):  # the other policy tells at once
        replace(config, on_damage="stop").build(SEED)


def test_quarantine_outlives_the_attempt(folders: dict[str, Path], tmp_path: Path) -> None:
    """A shard that heals half-way does not change the order of a run: its rows stay substituted."""
    folder = Path(shutil.copytree(folders["damaged"], tmp_path / "data"))
    config = replace(configurations(folders)["substitute"], path=str(folder))
    first = open_train(config)
    first.bad_data.keep(tmp_path / "quarantine", rank=0)
    before = first.batch(range(480))
    shutil.copytree(folders["large"], folder, dirs_exist_ok=True)  # healed
    second = open_train(config)
    second.bad_data.keep(tmp_path / "quarantine", rank=3)
    after = second.batch(range(480))
    np.testing.assert_array_equal(after["tokens"], before["tokens"])
    np.testing.assert_array_equal(after["substituted"], before["substituted"])


# ---- another order is refused, appended shards join ------------------------------------------------------------


def test_state_of_another_order_is_refused(folders: dict[str, Path]) -> None:
    configs = configurations(folders)
    state = loader_state(open_train(configs["best_fit"]), 48)
    assert check_loader_state(open_train(configs["best_fit"]), state) == 48
    for other in ("concatenate", "reserve", "mixed"):
        with pytest.raises(ValueError, match=r"fingerprint.*What to do"):
            check_loader_state(open_train(configs[other]), state)


def test_phases_may_change_ahead_but_not_behind(folders: dict[str, Path]) -> None:
    mixed = configurations(folders)["mixed"]
    assert isinstance(mixed, MixedTextConfig)
    state = loader_state(open_train(mixed), 120)
    later = PhaseConfig(from_sample=300, weights={"small": 1.0})
    check_loader_state(open_train(replace(mixed, phases=(*mixed.phases[:2], later))), state)
    earlier = PhaseConfig(from_sample=100, weights={"small": 1.0})
    for changed in (mixed.phases[:1], (mixed.phases[0], earlier), (*mixed.phases[:1], later)):
        with pytest.raises(ValueError, match="taken effect"):
            check_loader_state(open_train(replace(mixed, phases=changed)), state)


def test_appended_shards_take_effect_at_their_sample(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["large"], tmp_path / "data"))
    config = TextDataConfig(path=str(folder), sequence_length=S).frozen()
    expected = open_train(config).batch(range(400))["tokens"]
    state = loader_state(open_train(config), 96)
    new = append_documents(folder, 150, seed=77)
    assert new != config.edition

    # Nothing changes for a run that does not ask for them.
    unaware = open_train(config)
    check_loader_state(unaware, state)
    np.testing.assert_array_equal(unaware.batch(range(400))["tokens"], expected)

    grown = replace(config, appended=(AppendedConfig(from_sample=96, edition=new),))
    assert list(grown.violations()) == []
    source = open_train(grown)
    check_loader_state(source, state)
    np.testing.assert_array_equal(source.batch(range(96))["tokens"], expected[:96])
    resumed, undisturbed = (s.batch(range(96, 400))["tokens"] for s in (open_train(grown), source))
    np.testing.assert_array_equal(resumed, undisturbed)
    shards = Counter(p["shard"] for index in range(96, 400) for p in source.provenance(index))
    old = {shard["name"] for shard in Manifest.load(folder).edition(str(config.edition)).split("train")["shards"]}
    assert any(shard not in old for shard in shards)

    with pytest.raises(ValueError, match="taken effect"):  # in the past of a run
        check_loader_state(open_train(replace(grown, appended=(AppendedConfig(from_sample=40, edition=new),))), state)
    for wrong in ("0" * 32, str(config.edition)):  # unknown, and what the order begins with
        faulty = replace(config, appended=(AppendedConfig(from_sample=96, edition=wrong),))
        assert [field for field, *_ in faulty.violations()] == ["appended[0].edition"]
    newer = append_documents(folder, 50, seed=78)
    backwards = tuple(AppendedConfig(from_sample=at, edition=edition) for at, edition in ((96, newer), (200, new)))
    assert [field for field, *_ in replace(config, appended=backwards).violations()] == ["appended[1].edition"]
    # A spare row never comes from what is appended later.
    patient = replace(grown, path=str(folder), on_damage="substitute")
    assert max(patient.build(SEED).train._opener._spare_segments) < len(open_train(config)._plan.rows)


def test_appended_shards_of_a_source_join_its_mixture(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["large"], tmp_path / "data"))
    sources = {"large": str(folder), "small": str(folders["small"])}
    config = MixedTextConfig(sources=sources, weights={"large": 2.0, "small": 1.0}, sequence_length=S).frozen()
    expected = open_train(config).batch(range(240))["tokens"]
    state = loader_state(open_train(config), 120)
    new = append_documents(folder, 150, seed=77)
    np.testing.assert_array_equal(open_train(config).batch(range(240))["tokens"], expected)
    join = MixedAppendedConfig(source="large", from_sample=120, edition=new)
    grown = replace(config, appended=(join,))
    assert list(grown.violations()) == []
    source = open_train(grown)
    check_loader_state(source, state)
    np.testing.assert_array_equal(source.batch(range(120))["tokens"], expected[:120])
    resumed, undisturbed = (s.batch(range(120, 500))["tokens"] for s in (open_train(grown), source))
    np.testing.assert_array_equal(resumed, undisturbed)
    old = {shard["name"] for shard in Manifest.load(folders["large"]).split("train")["shards"]}
    met = {p["shard"] for index in range(120, 500) for p in source.provenance(index) if p["source"] == "large"}
    assert met - old
    stranger = replace(config, appended=(replace(join, source="other"),))
    assert [field for field, *_ in stranger.violations()] == ["appended"]


def test_a_violation_for_every_fault_of_a_mixture(folders: dict[str, Path], tmp_path: Path) -> None:
    faulty = MixedTextConfig(
        sources={"large": str(folders["large"]), "none": str(tmp_path / "none")},
        weights={"large": float("nan"), "other": 1.0},
        sequence_length=1,
        damage_budget=-1,
    )
    assert {field for field, *_ in faulty.violations()} == {
        "sequence_length",
        "damage_budget",
        "weights.large",
        "weights.other",
        "sources.none",
    }
