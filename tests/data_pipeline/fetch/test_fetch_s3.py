"""S3 against a server on loopback: moto for what is right, the misbehaving server for what is not."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import boto3
import fault_server as faults
import pytest
from fault_server import FaultServer
from fetch_support import DATA, FakeTime
from moto.server import ThreadedMotoServer

from data_pipeline.errors import DamagedDataError, FetchError, MissingDataError
from data_pipeline.fetch.retry import Retry
from data_pipeline.fetch.s3_storage import S3Storage, client_options
from data_pipeline.fetch.settings import FetchSettings
from data_pipeline.fetch.storage import Storage, open_storage

LOGIN = {"s3_access_key_id": "id", "s3_secret_access_key": "key", "s3_region": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="id", aws_secret_access_key="key"
    )
    client.create_bucket(Bucket="corpus")
    client.put_object(Bucket="corpus", Key="v1/a.tar", Body=DATA)
    client.put_object(Bucket="corpus", Key="v1/b c+é.tar", Body=b"odd name")
    client.put_object(Bucket="corpus", Key="v1/empty", Body=b"")
    yield url
    moto.stop()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def open_s3(endpoint: str, url: str = "s3://corpus/v1/", **settings: object) -> S3Storage:
    return S3Storage(url, FetchSettings(**{**LOGIN, "s3_endpoint": endpoint, **settings}))  # type: ignore[arg-type]


def open_against(server: FaultServer, time: FakeTime, **settings: object) -> S3Storage:
    """``server`` plays an S3 server for bucket ``set``."""
    settings = {**LOGIN, "s3_endpoint": server.url, **settings}
    retry = partial(Retry, clock=time.clock, sleep=time.sleep, jitter=lambda: 1.0)
    return S3Storage("s3://set", FetchSettings(**settings), retry)  # type: ignore[arg-type]


@pytest.mark.parametrize("part_bytes", [7919, 10**7])
def test_ranges_whole_objects_and_sizes(endpoint: str, part_bytes: int) -> None:
    storage = open_s3(endpoint, part_bytes=part_bytes)
    assert isinstance(storage, Storage)
    for start, stop in ((0, 1), (5, 60_000), (len(DATA) - 1, len(DATA)), (9, 9)):
        assert storage.read("a.tar", start, stop - start) == DATA[start:stop]
    assert storage.read("a.tar") == DATA
    assert storage.read("a.tar", 99_000) == DATA[99_000:]
    assert storage.read("empty") == b""
    assert storage.read("b c+é.tar") == b"odd name"
    assert storage.size("a.tar") == len(DATA)
    assert storage.size("empty") == 0
    storage.close()


def test_the_bucket_root_is_a_root(endpoint: str) -> None:
    assert open_s3(endpoint, "s3://corpus").read("v1/a.tar", 0, 5) == DATA[:5]


@pytest.mark.parametrize(
    ("url", "name"), [("s3://corpus/v1", "none.tar"), ("s3://corpus/v2", "a.tar"), ("s3://nobucket/v1", "a.tar")]
)
def test_what_is_not_there_fails_at_once(endpoint: str, url: str, name: str) -> None:
    storage = open_s3(endpoint, url)
    with pytest.raises(MissingDataError, match=rf"^{url}/{name}: not found \(HTTP 404\)\. What to do"):
        storage.read(name, 0, 10)
    assert storage.counters.as_dict()["requests"] == 1


@pytest.mark.parametrize(("start", "length"), [(len(DATA) - 5, 6), (len(DATA), 1), (len(DATA) + 5, 10)])
def test_a_short_object_is_damage(endpoint: str, start: int, length: int) -> None:
    with pytest.raises(DamagedDataError, match=f"the file ends at byte {len(DATA)}, but bytes {start} to") as caught:
        open_s3(endpoint).read("a.tar", start, length)
    assert caught.value.byte == len(DATA)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_usual_environment_is_enough(endpoint: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "key"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv(variable, endpoint)
    assert open_storage("s3://corpus/v1").read("a.tar", 3, 4) == DATA[3:7]


def test_profile_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / ".aws"
    folder.mkdir()
    (folder / "config").write_text("[default]\nregion = r0\n[profile lab]\nregion = r1\n")
    (folder / "credentials").write_text("[default]\naws_access_key_id = a%\naws_secret_access_key = b\n")
    home = {"HOME": str(tmp_path)}

    def options(environment: dict[str, str], **settings: str) -> tuple[str | None, ...]:
        found = client_options(FetchSettings(**settings), home | environment)  # type: ignore[arg-type]
        return tuple(found.get(name) for name in ("region", "access_key_id", "secret_access_key"))

    assert options({}) == ("r0", "a%", "b")
    assert options({"AWS_PROFILE": "lab"}) == ("r1", None, None)
    assert options({"AWS_ACCESS_KEY_ID": "x", "AWS_REGION": "y"}) == (None, None, None), "the client reads these"
    assert options({}, **LOGIN) == ("us-east-1", "id", "key")
    assert client_options(FetchSettings(s3_anonymous=True), home)["skip_signature"] is True


@pytest.mark.parametrize(
    ("code", "kind"), [(403, MissingDataError), (401, MissingDataError), (410, MissingDataError), (400, FetchError)]
)
def test_what_cannot_heal_fails_at_once(
    server: FaultServer, fake_time: FakeTime, code: int, kind: type[Exception]
) -> None:
    server.always["/set/a.tar"] = faults.status(code)
    with pytest.raises(kind, match=rf"^s3://set/a.tar: .*HTTP {code}"):
        open_against(server, fake_time).read("a.tar", 0, 10)
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_busy_twice_then_fine(endpoint: str, server: FaultServer, fake_time: FakeTime, code: int) -> None:
    server.plan["/set/a.tar"].extend([faults.status(code)] * 2)
    server.always["/set/a.tar"] = s3_well
    storage = open_against(server, fake_time, first_wait_s=1)
    assert storage.read("a.tar", 5, 10) == DATA[5:15]
    assert fake_time.waits == [1, 2]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("short", "the body ended early"),
        ("reset", "the connection was broken|the body ended early"),
        ("silent", "no data in time"),
        ("wrong_range", "the connection was broken|other bytes than asked for"),
    ],
)
def test_faults_are_tried_again_and_named_alike(
    server: FaultServer, fake_time: FakeTime, fault: str, words: str
) -> None:
    behaviour = getattr(faults, fault)
    server.always["/set/a.tar"] = lambda handler, data: behaviour(S3Head(handler), data)
    messages = set()
    for attempts in (2, 3):
        with pytest.raises(FetchError, match=words) as caught:
            open_against(server, fake_time, attempts=attempts, read_timeout_s=0.3).read("a.tar", 0, 90_000)
        messages.add(str(caught.value))
        assert caught.value.attempts == attempts
    assert len(messages) == 1


def test_a_server_without_ranges_is_refused(server: FaultServer, fake_time: FakeTime) -> None:
    server.always["/set/a.tar"] = lambda handler, data: faults.ignores_range(S3Head(handler), data)
    with pytest.raises(FetchError, match="ignores byte ranges"):
        open_against(server, fake_time).read("a.tar", 5, 10)


def test_missing_credentials_are_named(
    server: FaultServer, fake_time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own words for it, as a machine without a metadata service gives them."""
    from obstore.exceptions import GenericError

    def get(*args: object, **options: object) -> None:
        raise GenericError("Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 4.2ms")

    monkeypatch.setattr("obstore.get", get)
    with pytest.raises(FetchError, match=r"^s3://set/a\.tar: .*no credentials were found.*AWS_ACCESS_KEY_ID"):
        open_against(server, fake_time).read("a.tar", 5, 10)
    assert fake_time.waits == []


def test_refused_connections_are_tried_again(fake_time: FakeTime, server: FaultServer) -> None:
    storage = open_against(server, fake_time, attempts=3, s3_endpoint="http://127.0.0.1:9")
    with pytest.raises(FetchError, match="cannot be reached or refused"):
        storage.read("a.tar", 0, 1)
    assert len(fake_time.waits) == 2


def test_a_forked_child_is_told_instead_of_hanging(endpoint: str) -> None:
    storage = open_s3(endpoint)
    storage.read("a.tar", 0, 1)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            storage.read("a.tar", 0, 1)
        except FetchError as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"start method" in os.read(read_end, 1000)
    os.close(read_end)
    os.close(write_end)


class S3Head:
    """A handler whose heads also hold what the S3 client wants of every answer."""

    def __init__(self, handler: faults.Handler) -> None:
        self.__dict__["_handler"] = handler

    def __getattr__(self, name: str) -> object:
        return getattr(self._handler, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._handler, name, value)

    def head(self, status: int, **headers: object) -> None:
        self._handler.head(status, ETag='"e"', Last_Modified="Wed, 21 Oct 2015 07:28:00 GMT", **headers)

    def partial_head(self, data: bytes, length: int | None = None) -> bytes:
        return faults.Handler.partial_head(self, data, length)  # type: ignore[arg-type]


def s3_well(handler: faults.Handler, data: bytes) -> None:
    faults.well(S3Head(handler), data)  # type: ignore[arg-type]
