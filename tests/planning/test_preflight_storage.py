"""The trial of the run root: it tries for real, leaves nothing, and tells the reasons for a failure apart."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.planning.preflight import storage
from pretrain.planning.preflight.findings import Level
from pretrain.planning.preflight.subject import Subject


def test_a_sound_folder_passes_and_stays_as_it_was(subject: Callable[..., Subject], tmp_path: Path) -> None:
    (found,) = storage.check(subject())
    assert found.level is Level.OK
    assert os.listdir(tmp_path) == []


def test_a_root_that_is_not_there_yet_is_tried_in_the_folder_that_will_hold_it(
    subject: Callable[..., Subject], tmp_path: Path
) -> None:
    (found,) = storage.check(subject(root=tmp_path / "not" / "yet"))
    assert found.level is Level.OK
    assert f"tried in {tmp_path}" in found.found
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "full disk"),
        (errno.EDQUOT, "over the disk quota"),
        (errno.EIO, "input/output error"),
        (errno.ESTALE, "stale"),
    ],
)
def test_reasons_are_told_apart_and_nothing_is_left(
    subject: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "fsync", refuse)
    (found,) = storage.check(subject())
    assert found.level is Level.ERROR
    assert words in found.found
    assert "write and sync a file" in found.found
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "read-only"), (errno.EACCES, "not be written by")])
def test_a_folder_that_takes_nothing(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(self: Path, *more: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    (found,) = storage.check(subject())
    assert found.level is Level.ERROR
    assert words in found.found


def test_a_file_in_the_way(subject: Callable[..., Subject], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = storage.check(subject(root=tmp_path / "file" / "runs"))
    assert found.level is Level.ERROR
    assert "is a file" in found.found


def test_locks_need_a_folder_to_be_made_once_only(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def make_again(self: Path, *more: object, **options: object) -> None:
        make(self, exist_ok=True)

    monkeypatch.setattr(Path, "mkdir", make_again)
    (found,) = storage.check(subject())
    assert found.level is Level.ERROR
    assert "locks rest on that" in found.found


_ON_SMALL_DISK = """
import sys
from pathlib import Path
from pretrain.config.schema import Config, RunConfig
from pretrain.planning.preflight import storage
from pretrain.planning.preflight.subject import Subject
for finding in storage.check(Subject({}, Config(run=RunConfig(root="/mnt")))):
    print(finding.level, finding.found)
"""


@pytest.mark.parametrize(
    ("options", "words"), [("size=64k", "is on a full disk"), ("ro,size=9m", "is mounted read-only")]
)
def test_a_real_full_disk_and_a_real_read_only_one(options: str, words: str) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "mount -t tmpfs none /mnt"], check=False).returncode:
        pytest.skip("no mounts in a namespace of one's own here")
    command = f'mount -t tmpfs -o {options} none /mnt && exec "$0" -c "$1"'
    done = subprocess.run(
        [*mount, command, sys.executable, _ON_SMALL_DISK], capture_output=True, text=True, timeout=60, check=True
    )
    first = done.stdout.splitlines()[0]
    assert first.startswith("error")
    assert words in first


def test_the_file_system_of_a_folder_is_that_of_its_nearest_mount() -> None:
    assert storage.file_system(Path("/proc/self")) == "proc"
