"""Fragments whose values are made when they are asked for: the file of plain ones, without all copies at once."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch

from pretrain.checkpoint.fragment import Fragment, LazyFragment
from pretrain.checkpoint.rank_file import HostMemory, write_rank_file
from pretrain.parallel.shard import Shard

SHAPE = (6, 4)
SHARD = Shard.whole(SHAPE)


def test_they_are_written_one_after_the_other_and_alike(tmp_path: Path) -> None:
    live: list[weakref.ref[torch.Tensor]] = []
    most = 0
    values = torch.arange(24.0)

    def lazy(start: int) -> LazyFragment:
        def read() -> torch.Tensor:
            nonlocal most
            made = values[start : start + 3].clone()
            live.append(weakref.ref(made))
            most = max(most, sum(ref() is not None for ref in live))
            return made

        return LazyFragment("w", "master", SHAPE, start, SHARD, 3, torch.float32, read)

    plain = [Fragment("w", "master", SHAPE, start, values[start : start + 3], SHARD) for start in range(0, 24, 3)]
    made = [lazy(start) for start in range(0, 24, 3)]
    expected = write_rank_file(tmp_path / "plain", plain)
    live.clear()
    found = write_rank_file(tmp_path / "lazy", made)
    assert most <= 2  # the one that is written, and the next
    assert (tmp_path / "lazy").read_bytes() == (tmp_path / "plain").read_bytes()
    assert found[0] == expected[0]
    HostMemory().take(made, "snapshot").write(tmp_path / "snapshot")
    assert (tmp_path / "snapshot").read_bytes() == (tmp_path / "plain").read_bytes()


def test_it_tells_size_and_type_without_reading() -> None:
    def read() -> torch.Tensor:
        raise AssertionError("was read")

    fragment = LazyFragment("w", "exp_avg", SHAPE, 4, SHARD, 5, torch.float32, read)
    assert (fragment.numel, fragment.dtype, fragment.start, fragment.shape) == (5, torch.float32, 4, SHAPE)
