"""Digests of canonical state: the same for every way to share a tensor, another for every change of its bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import digest as module
from pretrain.checkpoint.digest import MODULUS, flat_indices, fragment_digest
from pretrain.checkpoint.fragment import Fragment
from pretrain.parallel.shard import Shard


def fragment(values: torch.Tensor, shape: tuple[int, ...], shard: Shard, start: int = 0) -> Fragment:
    return Fragment("w", "master", shape, start, values, shard)


def whole(tensor: torch.Tensor) -> int:
    shape = tuple(tensor.shape)
    return fragment_digest(fragment(tensor.reshape(-1), shape, Shard.whole(shape)))


def reference(words: list[int]) -> int:
    """The definition in plain integers: hash of position and bits (splitmix64's finaliser), summed."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % MODULUS
        return x ^ (x >> 31)

    total = 0
    for index, bits in enumerate(words):
        total += mix((mix((index + 1) * 0x9E3779B97F4A7C15 % MODULUS) + bits) % MODULUS)
    return total % MODULUS


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float32, np.uint32),
        (torch.bfloat16, np.uint16),
        (torch.float64, np.uint64),
        (torch.int64, np.uint64),
        (torch.bool, np.uint8),
    ],
)
def test_agrees_with_the_definition_in_plain_integers(dtype: torch.dtype, words: type) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = (torch.randn(7, 5, generator=generator) * 100).to(dtype)
    raw = tensor.reshape(-1).view(torch.uint8).numpy().view(words)
    assert whole(tensor) == reference([int(word) for word in raw])


@st.composite
def shared_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Fragment]]:
    """A random tensor and fragments that tile it: split along a dimension, each shard cut at random places."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    size = draw(st.sampled_from([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0]))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    fragments = []
    for rank, held in enumerate(tensor.chunk(size, dim)):
        shard, flat = Shard.split(shape, dim, rank, size), held.reshape(-1)
        cuts = sorted(draw(st.lists(st.integers(0, flat.numel()), max_size=3)))
        borders = [0, *cuts, flat.numel()]
        fragments += [fragment(flat[low:high], shape, shard, low) for low, high in itertools.pairwise(borders)]
    return tensor, fragments


@settings(max_examples=200, deadline=None)
@given(shared_tensors(), st.sampled_from([3, 1 << 20]))
def test_shares_of_any_layout_add_up_to_the_whole(case: tuple[torch.Tensor, list[Fragment]], chunk: int) -> None:
    tensor, fragments = case
    expected = whole(tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        assert sum(map(fragment_digest, fragments)) % MODULUS == expected


@settings(max_examples=100, deadline=None)
@given(shared_tensors())
def test_positions_are_those_of_the_whole_tensor(case: tuple[torch.Tensor, list[Fragment]]) -> None:
    tensor, fragments = case
    flat = tensor.reshape(-1)
    for part in fragments:
        index = flat_indices(part.shard, part.start, part.start + part.values.numel(), torch.device("cpu"))
        assert torch.equal(flat[index], part.values)
        assert index.tolist() == [part.shard.flat_index(part.start + i) for i in range(len(index))]


def flip(element: int, bit: int) -> Callable[[torch.Tensor], None]:
    def change(flat: torch.Tensor) -> None:
        flat.view(torch.int32)[element] ^= 1 << bit if bit < 31 else -(1 << 31)

    return change


def swap(i: int, j: int) -> Callable[[torch.Tensor], None]:
    def change(flat: torch.Tensor) -> None:
        flat[[i, j]] = flat[[j, i]]

    return change


@pytest.mark.parametrize(
    "change",
    [*(flip(element, bit) for element in (0, 1, 999) for bit in range(32)), swap(0, 1), swap(17, 801)],
)
def test_every_small_change_shows(change: Callable[[torch.Tensor], None]) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    before = whole(tensor)
    change(tensor)
    assert whole(tensor) != before


def test_sign_of_zero_shape_of_nan_and_order_of_rows_show() -> None:
    zeros = torch.zeros(4)
    assert whole(zeros) != whole(torch.tensor([0.0, -0.0, 0.0, 0.0]))
    quiet = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert whole(quiet) != whole(payload)
    rows = torch.arange(12.0).view(3, 4)
    assert whole(rows) != whole(rows.flip(0))


def test_an_element_held_twice_or_by_nobody_shows() -> None:
    tensor = torch.zeros(prod((4, 6)))
    shard = Shard.whole((4, 6))
    halves = [fragment(tensor[:12], (4, 6), shard, 0), fragment(tensor[12:], (4, 6), shard, 12)]
    overlap = fragment(tensor[11:], (4, 6), shard, 11)
    gap = fragment(tensor[13:], (4, 6), shard, 13)
    expected = sum(map(fragment_digest, halves)) % MODULUS
    for wrong in (overlap, gap):
        assert (fragment_digest(halves[0]) + fragment_digest(wrong)) % MODULUS != expected
