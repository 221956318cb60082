"""Sharded fragments: any split of the writers, any split of the readers, bit for bit; and nothing but exact covers."""

from __future__ import annotations

import itertools
import json
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.saving import save_by_ranks, whole
from torch import Tensor, nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.manifest import CheckpointError, CheckpointSaveError
from pretrain.checkpoint.reader import CheckpointReader, check_model, load_weights
from pretrain.parallel.canonical import Split, mark_split
from pretrain.parallel.shard import Shard


class Cut(NamedTuple):
    """Division of a tensor along ``dim`` at ``places``, ascending from 0 to the size of the dimension."""

    dim: int
    places: list[int]

    def parts(self, tensor: Tensor) -> list[tuple[Shard, Tensor]]:
        """Each part's shard with its elements, which torch's own slicing gives."""
        shape = tuple(tensor.shape)
        rows, inner = prod(shape[: self.dim]), prod(shape[self.dim + 1 :])
        return [
            (
                Shard(rows, shape[self.dim] * inner, first * inner, last * inner),
                tensor.narrow(self.dim, first, last - first).reshape(-1),
            )
            for first, last in zip(self.places, self.places[1:], strict=False)
        ]


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> Cut:
    dim = draw(st.integers(0, len(shape) - 1))
    inner = draw(st.lists(st.integers(1, shape[dim]), max_size=3, unique=True))
    return Cut(dim, sorted({0, *inner, shape[dim]}))


@st.composite
def moves(draw: st.DrawFn) -> tuple[Tensor, Cut, list[int], Cut, tuple[int, int]]:
    """A tensor, how writers split it, where each share is cut once more, how readers split it, and a part of that."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    tensor = torch.arange(prod(shape)).to(dtype).reshape(shape)
    flat_cuts = draw(st.lists(st.integers(0, tensor.numel()), max_size=3))
    ends = sorted([draw(st.integers(0, tensor.numel())), draw(st.integers(0, tensor.numel()))])
    return tensor, draw(cuts(shape)), flat_cuts, draw(cuts(shape)), (ends[0], ends[1])


@settings(max_examples=150, deadline=None)
@given(moves())
def test_every_split_reads_every_other(move: tuple[Tensor, Cut, list[int], Cut, tuple[int, int]]) -> None:
    tensor, written, flat_cuts, wanted, (first, last) = move
    ranks: list[list[Fragment]] = []
    for shard, values in written.parts(tensor):
        # As data-parallel ranks share a tensor-parallel rank's share: flat ranges, some of them empty.
        places = sorted({0, *(min(place, shard.numel) for place in flat_cuts), shard.numel})
        pieces = [
            Fragment("w", "master", tuple(tensor.shape), a, values[a:b], shard) for a, b in itertools.pairwise(places)
        ]
        ranks += [[piece] for piece in reversed(pieces)]
    # Nothing crashes here: syncing hundreds of files would only take time.
    with TemporaryDirectory() as folder, mock.patch("os.fsync"):
        reader = CheckpointReader(save_by_ranks(Path(folder), 1, ranks))
        assert torch.equal(reader.tensor("w", "master"), tensor)
        assert torch.equal(reader.read("w", "master", first, last), tensor.reshape(-1)[first:last])
        for shard, values in wanted.parts(tensor):
            a, b = min(first, shard.numel), min(last, shard.numel)
            assert torch.equal(reader.read_shard("w", "master", shard, a, b), values[a:b])


def test_a_reader_of_columns_loads_only_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(64.0).reshape(8, 8)
    ranks = [[Fragment("w", "master", (8, 8), 0, v, s)] for s, v in Cut(1, [0, 4, 8]).parts(tensor)]
    reader = CheckpointReader(save_by_ranks(tmp_path, 1, ranks))
    asked = []
    read = CheckpointReader.read

    def spy(self: CheckpointReader, name: str, slot: str, start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return read(self, name, slot, start, stop)

    monkeypatch.setattr(CheckpointReader, "read", spy)
    quarter = Shard.split((8, 8), 1, 1, 4)
    assert torch.equal(reader.read_shard("w", "master", quarter, 4, 8), tensor[2:4, 2:4].reshape(-1))
    assert asked == [(18, 28)]  # from the first wanted element, in row 2, to the last, in row 3
    # The same split, or a flat range, needs no such detour.
    asked.clear()
    half = Shard.split((8, 8), 1, 1, 2)
    assert torch.equal(reader.read_shard("w", "master", half, 6, 30), tensor[:, 4:].reshape(-1)[6:30])
    assert asked == []


def piece(shard: Shard, start: int, stop: int) -> Fragment:
    return Fragment("w", "master", (4, 6), start, torch.zeros(stop - start), shard)


LEFT, RIGHT = Shard(4, 6, 0, 2), Shard(4, 6, 2, 6)
FLAT = Shard.whole((4, 6))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([piece(LEFT, 0, 8)], "leave a gap at column 2"),
        ([piece(LEFT, 0, 8), piece(RIGHT, 0, 15)], r"leave a gap at element of columns 2\.\.6, its 15"),
        ([piece(LEFT, 0, 8), piece(RIGHT, 0, 16), piece(LEFT, 7, 8)], r"overlap at element of columns 0\.\.2, its 7"),
        ([piece(LEFT, 0, 8), piece(Shard(4, 6, 1, 6), 0, 20)], "overlap at column 1"),
        ([piece(LEFT, 0, 8), piece(FLAT, 8, 24)], "split along different dimensions"),
        ([piece(FLAT, 0, 12), piece(FLAT, 13, 24)], "leave a gap at element 12"),
    ],
)
def test_pieces_that_do_not_tile_are_refused(tmp_path: Path, pieces: list[Fragment], message: str) -> None:
    with pytest.raises(CheckpointSaveError, match=f"master:w: fragments.* {message}"):
        save_by_ranks(tmp_path, 1, [pieces])
    assert not list(tmp_path.iterdir())


def test_ranks_that_disagree_on_a_tensor_are_refused(tmp_path: Path) -> None:
    ranks = [[whole("w", "master", torch.zeros(2))], [whole("w", "master", torch.zeros(3))]]
    with pytest.raises(CheckpointSaveError, match=r"master:w: rank 1 has F32 \[3\], another rank F32 \[2\]"):
        save_by_ranks(tmp_path, 1, ranks)


class TwoLayers(nn.Module):
    """A packed first linear and a second one, whole or as one tensor-parallel share."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(4, 12 // size)
        self.first.canonical_components = {  # type: ignore[assignment]
            name: {"gate": 4 // size, "up": 8 // size} for name in ("weight", "bias")
        }
        self.second = nn.Linear(8 // size, 4, bias=False)
        if size > 1:
            mark_split(self.first.weight, Split(0, rank, size))
            mark_split(self.first.bias, Split(0, rank, size))
            mark_split(self.second.weight, Split(1, rank, size))


@pytest.fixture
def stored(tmp_path: Path) -> tuple[TwoLayers, CheckpointReader]:
    """A whole model, and its checkpoint as two tensor-parallel ranks would write it, in the logical names."""
    torch.manual_seed(0)
    model = TwoLayers()
    weight, bias, second = (p.detach() for p in (model.first.weight, model.first.bias, model.second.weight))
    tensors = {
        "first.gate.weight": (weight[:4], 0),
        "first.up.weight": (weight[4:], 0),
        "first.gate.bias": (bias[:4], 0),
        "first.up.bias": (bias[4:], 0),
        "second.weight": (second, 1),
    }
    ranks: list[list[Fragment]] = [[], []]
    for name, (tensor, dim) in tensors.items():
        half = tensor.shape[dim] // 2
        for rank, (shard, values) in enumerate(Cut(dim, [0, half, 2 * half]).parts(tensor)):
            ranks[rank].append(Fragment(name, "master", tuple(tensor.shape), 0, values, shard))
    return model, CheckpointReader(save_by_ranks(tmp_path, 1, ranks))


def test_weights_load_into_a_model_that_holds_a_share(stored: tuple[TwoLayers, CheckpointReader]) -> None:
    model, reader = stored
    whole_model = TwoLayers()
    load_weights(whole_model, reader)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole_model.parameters(), strict=True))
    for rank in range(4):
        share = TwoLayers(rank, 4)
        load_weights(share, reader)
        gate, up = model.first.weight[:4], model.first.weight[4:]
        assert torch.equal(share.first.weight, torch.cat([gate.chunk(4)[rank], up.chunk(4)[rank]]))
        assert torch.equal(share.second.weight, model.second.weight.chunk(4, 1)[rank])


def test_only_a_model_that_says_so_may_hold_a_part(stored: tuple[TwoLayers, CheckpointReader]) -> None:
    _, reader = stored
    stage = TwoLayers()
    del stage.first
    with pytest.raises(CheckpointError, match=r"first\.gate\.bias: not in the model"):
        check_model(stage, reader)
    load_weights(stage, reader, partial=True)
    stage.third = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"third\.weight: missing in the checkpoint"):
        check_model(stage, reader, partial=True)


def test_the_manifest_says_which_columns_a_piece_holds(stored: tuple[TwoLayers, CheckpointReader]) -> None:
    _, reader = stored
    body = json.loads((reader.folder / "manifest.json").read_text())
    assert body["version"] == 2
    fragments = {key: entry["fragments"] for key, entry in body["tensors"].items()}
    # Shape [4, 8], split along dim 1: rows of 8 elements, of which each file holds four columns.
    assert fragments["master:second.weight"] == [
        ["rank_00000.safetensors", 0, 16, 8, 0, 4],
        ["rank_00001.safetensors", 0, 16, 8, 4, 8],
    ]
    # Split along dim 0: a flat range of the tensor, as version 1 would have it.
    assert fragments["master:first.gate.bias"] == [["rank_00000.safetensors", 0, 2], ["rank_00001.safetensors", 2, 4]]
