"""The disk that checkpoints take: how many there are at the same time, how large, against space and quotas."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint.store import CheckpointStore, checkpoint_name
from pretrain.config.schema import MuonConfig, TrainConfig
from pretrain.planning.preflight import disk, quota
from pretrain.planning.preflight.findings import Level
from pretrain.planning.preflight.subject import Subject


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 60),
    interval=st.integers(0, 20),
    newest=st.integers(1, 4),
    every=st.integers(0, 25),
    best=st.integers(0, 3),
)
def test_what_is_kept_is_never_more_than_said(
    tmp_path_factory: pytest.TempPathFactory, steps: int, interval: int, newest: int, every: int, best: int
) -> None:
    """Against the store itself, which saves, scores and prunes as a run does."""
    train = TrainConfig(
        steps=steps, checkpoint_interval=interval, keep_checkpoints=newest, keep_every=every, keep_best=best
    )
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    most = 0
    for step in range(1, steps + 1):
        if (interval and step % interval == 0) or step == steps:
            (store.root / checkpoint_name(step)).mkdir()
            most = max(most, len(store.steps()))
            store.record_score(step, 1.0 / step)
            (store.root / "latest").write_text(checkpoint_name(step))
            store.prune(newest, every=every, best=best)
    assert most <= disk.most_kept(train) <= most + best


def test_bytes_of_a_checkpoint_are_three_numbers_a_parameter(subject: Callable[..., Subject]) -> None:
    made = subject()
    assert made.parameters is not None
    size = disk.checkpoint_size(made)
    assert size is not None
    assert 0 < size.num_bytes - 12 * made.parameters < 1 << 20


def test_matrices_of_muon_have_one_moment(subject: Callable[..., Subject]) -> None:
    adamw, muon = (disk.checkpoint_size(made) for made in (subject(), subject(optimizer=MuonConfig())))
    assert adamw is not None
    assert muon is not None
    assert muon.num_bytes < adamw.num_bytes


def _space(free: int, files: int = 10**6) -> Callable[[object], os.statvfs_result]:
    return lambda folder: os.statvfs_result((1, 1, 10**12, free, free, 10**7, files, files, 0, 255))


def test_too_little_space_is_an_error_whose_fix_fits(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(steps=1000, checkpoint_interval=10, keep_checkpoints=9)
    made = subject(train=train)
    size = disk.checkpoint_size(made)
    assert size is not None
    monkeypatch.setattr(disk.os, "statvfs", _space(5 * size.num_bytes))
    found = {finding.what: finding for finding in disk.check(made)}["free space"]
    assert found.level is Level.ERROR
    assert found.figures["needed"] == 10 * size.num_bytes
    assert "train.keep_checkpoints=4" in found.fix
    fixed = TrainConfig(steps=1000, checkpoint_interval=10, keep_checkpoints=4)
    after = {finding.what: finding for finding in disk.check(subject(train=fixed))}["free space"]
    assert after.level is Level.WARNING  # it fits, with nothing to spare


def test_few_inodes_are_an_error(subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.os, "statvfs", _space(10**12, files=3))
    assert [finding.what for finding in disk.check(subject()) if finding.level is Level.ERROR] == ["inodes"]


_LFS = """\
     /lustre 9000*  8192   10240 6d23h59m53s  120     0     0       -
"""
_NFS = """\
Disk quotas for user alice (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
nas:/home  1024*  1000  2048  1700000000  10  0  100  0
/dev/other     1     0     0           0   1  0    0  0
"""


@pytest.mark.parametrize(
    ("text", "names", "bytes_left", "files_left"),
    [
        (_LFS, {"/lustre"}, 1240 * 1024, None),
        (_NFS, {"/home", "nas:/home"}, 1024 * 1024, 90),
        (_NFS, {"/dev/other"}, None, None),
    ],
)
def test_quotas_as_the_commands_print_them(
    text: str, names: set[str], bytes_left: int | None, files_left: int | None
) -> None:
    (found,) = quota.parse(text.splitlines(), names, "user alice")
    assert (found.bytes_left, found.files_left) == (bytes_left, files_left)


def test_the_quota_counts_where_it_is_less_than_the_space(
    subject: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = quota.mount_point(tmp_path)
    program = tmp_path / "bin" / "quota"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{mount} 100* 50 110 0 1 0 0 0'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    found = {finding.what: finding for finding in disk.check(subject())}
    assert found["free space"].level is Level.OK
    assert found["quota"].level is Level.ERROR
    assert found["quota"].figures["free"] == 10 * 1024
