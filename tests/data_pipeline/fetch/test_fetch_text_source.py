"""A text dataset at a URL: the same order as from a folder, each segment fetched once, faults named or healed."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import boto3
import fault_server as faults
import numpy as np
import pytest
from fault_server import FaultServer
from moto.server import ThreadedMotoServer
from synthetic_text import write_dataset

from data_pipeline.config import TextDataConfig
from data_pipeline.config_common import FetchConfig
from data_pipeline.errors import DamagedDataError, MissingDataError
from data_pipeline.text_build import CacheSettings

S = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the plans of both splits, as one would upload it."""
    folder = write_dataset(tmp_path_factory.mktemp("remote") / "set", 300, 5)
    TextDataConfig(path=str(folder), sequence_length=S).build(0)
    return folder


@pytest.fixture
def web(folder: Path) -> Iterator[FaultServer]:
    server = FaultServer({f"/set/{path.name}": path.read_bytes() for path in folder.iterdir()})
    yield server
    server.close()


def remote(web: FaultServer, tmp_path: Path, **more: object) -> TextDataConfig:
    fetch = FetchConfig(cache_folder=str(tmp_path / "cache"), cache_gib=1, read_timeout_s=5, deadline_s=20)
    return TextDataConfig(path=f"{web.url}/set", sequence_length=S, fetch=fetch, **more)  # type: ignore[arg-type]


def shard_requests(web: FaultServer) -> list[str | None]:
    """Ranges of shards that were asked for; the one byte that tells a file's size is none."""
    return [asked for path, asked in web.requests if path.endswith(".tar") and asked not in (None, "bytes=0-0")]


def test_order_is_that_of_the_folder_and_segments_come_once(folder: Path, web: FaultServer, tmp_path: Path) -> None:
    expected = TextDataConfig(path=str(folder), sequence_length=S).build(3)
    config = remote(web, tmp_path)
    assert list(config.violations()) == []
    sources = config.build(3)
    assert sources.train.fingerprint == expected.train.fingerprint
    for first in range(0, 200, 8):
        batch, local = (source.batch(range(first, first + 8)) for source in (sources.train, expected.train))
        np.testing.assert_array_equal(batch["tokens"], local["tokens"])
    sources.train.close()
    asked = shard_requests(web)
    assert len(asked) == len(set(asked)) > 10
    again = config.build(3).train  # another process of the node, or the next attempt
    np.testing.assert_array_equal(again.batch(range(40))["tokens"], expected.train.batch(range(40))["tokens"])
    again.close()
    assert shard_requests(web) == asked
    assert sources.validation is not None
    assert expected.validation is not None
    np.testing.assert_array_equal(
        sources.validation.batch(range(5))["tokens"], expected.validation.batch(range(5))["tokens"]
    )
    sources.validation.close()


def test_a_flipped_byte_is_fetched_again_or_named(folder: Path, web: FaultServer, tmp_path: Path) -> None:
    expected = TextDataConfig(path=str(folder), sequence_length=S).build(3).train.batch(range(8))["tokens"]
    shards = [f"/set/{path.name}" for path in folder.glob("train-*.tar")]
    config = remote(web, tmp_path)
    source = config.build(3).train
    for path in shards:
        web.plan[path].append(faults.flip)  # once, in whatever comes first
    np.testing.assert_array_equal(source.batch(range(8))["tokens"], expected)
    source.close()

    for path in shards:
        web.always[path] = faults.flip
    other = remote(web, tmp_path / "other").build(3).train
    with pytest.raises(DamagedDataError, match=r"train-0000\d\d.tar: byte \d+.*What to do"):
        other.batch(range(64))
    other.close()
    patient = remote(web, tmp_path / "third", on_damage="substitute").build(3).train
    batch = patient.batch(range(8))
    assert batch["substituted"].any()
    np.testing.assert_array_equal(batch["tokens"][~batch["substituted"]], expected[~batch["substituted"]])
    patient.close()


def test_a_missing_shard_is_told_at_once(web: FaultServer, tmp_path: Path) -> None:
    del web.files["/set/train-000001.tar"]
    source = remote(web, tmp_path).build(3).train
    with pytest.raises(MissingDataError, match=r"train-000001\.tar"):
        source.batch(range(200))
    source.close()


def test_from_s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="corpus")
        for path in folder.iterdir():
            client.put_object(Bucket="corpus", Key=f"v1/{path.name}", Body=path.read_bytes())
        fetch = FetchConfig(cache_folder=str(tmp_path / "cache"), s3_endpoint=endpoint, s3_region="us-east-1")
        config = TextDataConfig(path="s3://corpus/v1", sequence_length=S, fetch=fetch)
        source = config.build(3).train
        expected = TextDataConfig(path=str(folder), sequence_length=S).build(3).train
        np.testing.assert_array_equal(source.batch(range(60))["tokens"], expected.batch(range(60))["tokens"])
        source.close()
    finally:
        moto.stop()


def test_the_default_folder_is_for_its_user_alone(
    folder: Path, web: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    config = TextDataConfig(path=f"{web.url}/set", sequence_length=S)
    cache = CacheSettings().path()
    for _ in range(2):
        source = config.build(3).train
        source.batch(range(8))
        source.close()
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700
        cache.chmod(0o777)  # as if it had been made carelessly
    assert any((cache / "segments-1" / "entries").iterdir())


@pytest.mark.parametrize("link", [False, True])
def test_a_default_folder_of_another_user_is_refused(
    web: FaultServer, tmp_path: Path, link: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    mine = os.getuid()
    cache = tmp_path / f"pretrain-data-{mine + 1}"
    (tmp_path / "elsewhere").mkdir()
    if link:
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        cache.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(ValueError, match=rf"{cache}.* owned by user {mine}.*What to do: .*cache_folder"):
        TextDataConfig(path=f"{web.url}/set", sequence_length=S).build(3)
    assert list(cache.iterdir()) == []


def test_a_local_dataset_leaves_the_default_folder_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    TextDataConfig(path=str(folder), sequence_length=2 * S).build(3)
    assert list(tmp_path.iterdir()) == []
