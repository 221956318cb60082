"""Local folders, names, and which storage a location opens."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from fetch_support import DATA, FakeTime
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DamagedDataError, FetchError, MissingDataError
from data_pipeline.fetch import storage as storage_module
from data_pipeline.fetch.counters import fetch_counters
from data_pipeline.fetch.http_storage import HttpStorage
from data_pipeline.fetch.retry import Retry
from data_pipeline.fetch.s3_storage import S3Storage
from data_pipeline.fetch.settings import FetchSettings
from data_pipeline.fetch.storage import ByteRange, LocalStorage, Storage, check_name, open_storage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local files")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.tar").write_bytes(DATA)
    (folder / "empty").touch()
    return folder


@given(st.integers(0, len(DATA)), st.integers(0, len(DATA)))
def test_reads_exactly_what_is_asked(folder: Path, one: int, other: int) -> None:
    start, stop = sorted((one, other))
    storage = open_storage(folder)
    assert storage.read("sub/a.tar", start, stop - start) == DATA[start:stop]
    assert storage.read("sub/a.tar", start) == DATA[start:]


def test_sizes_and_whole_files(folder: Path) -> None:
    storage = open_storage(str(folder))
    assert isinstance(storage, Storage)
    assert storage.size("sub/a.tar") == len(DATA)
    assert storage.read("sub/a.tar") == DATA
    assert storage.read("empty") == b""
    assert storage.size("empty") == 0
    assert storage.counters.as_dict()["bytes"] == len(DATA)  # type: ignore[attr-defined]


def test_a_file_url_may_hold_escapes(folder: Path) -> None:
    assert open_storage(folder.as_uri()).read("sub/a.tar", 0, 9) == DATA[:9]


@pytest.mark.parametrize(("start", "length"), [(len(DATA) - 5, 6), (len(DATA) + 1, 1), (len(DATA) + 1, None)])
def test_a_short_file_is_damage_and_named(folder: Path, start: int, length: int | None) -> None:
    with pytest.raises(
        DamagedDataError, match=rf"a\.tar: the file ends at byte {len(DATA)}, but bytes {start} to"
    ) as e:
        open_storage(folder).read("sub/a.tar", start, length)
    assert (e.value.shard, e.value.byte) == ("sub/a.tar", len(DATA))


def test_large_reads_go_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_LARGEST_READ", 999)
    assert open_storage(folder).read("sub/a.tar", 3, 50_000) == DATA[3:50_003]


@pytest.mark.parametrize(("name", "reason"), [("none", "No such file"), ("sub", "not a regular file")])
def test_missing_files_fail_at_once(folder: Path, name: str, reason: str) -> None:
    for call in (LocalStorage.read, LocalStorage.size):
        with pytest.raises(MissingDataError, match=f"{folder}/{name}: {reason}"):
            call(LocalStorage(folder), name)


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MissingDataError, match="not a regular file"):
        open_storage(tmp_path).read("pipe")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", "", ".", "a/", "a\x00b", "a\nb", "..\\x"])
def test_names_that_leave_the_root_are_refused(folder: Path, name: str) -> None:
    for attempt in (lambda: check_name(name), lambda: ByteRange(name, 0, 1), lambda: open_storage(folder).read(name)):
        with pytest.raises(ValueError, match="no name of a file below the data set's root"):
            attempt()


def test_ranges_that_cannot_be_are_refused() -> None:
    for start, stop in ((-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="are no range"):
            ByteRange("a", start, stop)


@pytest.mark.parametrize("failures", [2, 1000])
def test_a_network_file_system_may_stumble(folder: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    real, left, time = os.pread, [failures], FakeTime()

    def pread(*args: int) -> bytes:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(*args)

    monkeypatch.setattr(os, "pread", pread)
    settings = FetchSettings(attempts=5)
    storage = LocalStorage(folder, retry=Retry(settings, fetch_counters(), clock=time.clock, sleep=time.sleep))
    if failures == 2:
        assert storage.read("sub/a.tar", 1, 2) == DATA[1:3]
        assert len(time.waits) == 2
    else:
        with pytest.raises(FetchError, match="Stale file handle"):
            storage.read("sub/a.tar", 1, 2)


def test_many_threads_read_at_once(folder: Path) -> None:
    storage, wrong = open_storage(folder), []

    def read(seed: int) -> None:
        for start in range(seed, 60_000, 977):
            if storage.read("sub/a.tar", start, 1500) != DATA[start : start + 1500]:
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_locations_open_their_storage(tmp_path: Path) -> None:
    assert isinstance(open_storage(tmp_path), LocalStorage)
    assert isinstance(open_storage("relative/folder"), LocalStorage)
    assert isinstance(open_storage("HTTPS://host/a"), HttpStorage)
    assert isinstance(open_storage("s3://bucket/a"), S3Storage)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("gs://bucket/x", "scheme 'gs' is not supported"),
        ("file://other/x", "names host 'other'"),
        ("http:///x", "names no host"),
        ("s3:///x", "is no S3 location"),
    ],
)
def test_other_locations_are_refused(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"{complaint}.*What to do"):
        open_storage(url)
