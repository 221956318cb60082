"""http against a real server that misbehaves on purpose."""

from __future__ import annotations

import base64
import email.utils
import re
import socket
import threading
import time
from collections.abc import Callable

import fault_server as faults
import pytest
from fault_server import FaultServer
from fetch_support import DATA, FakeTime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DamagedDataError, FetchError, MissingDataError
from data_pipeline.fetch.http_storage import HttpStorage
from data_pipeline.fetch.storage import Storage

Open = Callable[..., HttpStorage]
A = "/set/a.tar"


@given(st.integers(0, len(DATA)), st.integers(0, len(DATA)), st.sampled_from([3000, 7919, 10**6]))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reads_exactly_what_is_asked_in_any_parts(open_http: Open, one: int, other: int, part_bytes: int) -> None:
    start, stop = sorted((one, other))
    storage = open_http(part_bytes=part_bytes)
    assert isinstance(storage, Storage)
    assert storage.read("a.tar", start, stop - start) == DATA[start:stop]


@pytest.mark.parametrize("part_bytes", [999, len(DATA), len(DATA) + 1, 10**7])
def test_whole_files_and_sizes(open_http: Open, server: FaultServer, part_bytes: int) -> None:
    storage = open_http(part_bytes=part_bytes)
    assert storage.read("a.tar") == DATA
    assert len(server.requests) == -(-len(DATA) // part_bytes)
    assert storage.read("a.tar", 500) == DATA[500:]
    assert storage.read("empty") == b""
    assert storage.size("a.tar") == len(DATA)
    assert storage.size("empty") == 0
    assert storage.read("b c+é.tar", 5, 5) == DATA[::-1][5:10]


def test_parts_are_in_flight_at_once_up_to_the_cap(open_http: Open, server: FaultServer) -> None:
    cap, parts = 3, 10
    storage = open_http(part_bytes=len(DATA) // parts, requests_per_node=cap, processes_per_node=1)
    server.plan[A].extend([faults.silent] * parts)
    result: list[bytes] = []
    thread = threading.Thread(target=lambda: result.append(storage.read("a.tar", 0, len(DATA))))
    thread.start()
    for _ in range(cap):
        server.arrived.get()
    # Further requests would only come once one of these ends.
    assert server.arrived.empty()
    server.release.set()
    thread.join()
    assert result == [DATA]
    assert len(server.requests) == parts


@pytest.mark.parametrize(
    ("code", "words"), [(404, "not found"), (410, "gone"), (403, "access denied"), (401, "other credentials")]
)
def test_what_cannot_heal_fails_at_once(open_http: Open, server: FaultServer, code: int, words: str) -> None:
    server.always[A] = faults.status(code, Retry_After=1)
    storage = open_http()
    for call in (lambda: storage.read("a.tar", 0, 10), lambda: storage.read("a.tar"), lambda: storage.size("a.tar")):
        before = len(server.requests)
        with pytest.raises(MissingDataError, match=rf"^{server.url}{A}: .*{words}.*HTTP {code}.*What to do") as caught:
            call()
        assert caught.value.shard == "a.tar"
        assert len(server.requests) == before + 1


@pytest.mark.parametrize("code", [400, 405, 418, 501])
def test_other_refusals_fail_at_once(open_http: Open, server: FaultServer, code: int) -> None:
    server.always[A] = faults.status(code)
    with pytest.raises(FetchError, match=f"HTTP {code}"):
        open_http().read("a.tar", 0, 10)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("start", "length"), [(len(DATA) - 5, 6), (len(DATA), 1), (len(DATA) + 7, 100)])
@pytest.mark.parametrize("behaviour", [faults.well, faults.ignores_range, faults.ignores_range_without_length])
def test_a_short_file_is_damage_at_once(
    open_http: Open, server: FaultServer, behaviour: faults.Behaviour, start: int, length: int
) -> None:
    server.always[A] = behaviour
    with pytest.raises(DamagedDataError, match=f"the file ends at byte {len(DATA)}, but bytes {start} to") as caught:
        open_http().read("a.tar", start, length)
    assert caught.value.byte == len(DATA)
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_busy_twice_then_fine(open_http: Open, server: FaultServer, fake_time: FakeTime, code: int) -> None:
    server.plan[A].extend([faults.status(code)] * 2)
    storage = open_http(first_wait_s=1)
    assert storage.read("a.tar", 5, 100) == DATA[5:105]
    assert fake_time.waits == [1, 2]
    assert storage.counters.as_dict()["retries"] == 2
    assert storage.counters.as_dict()["requests"] == 3


def test_retry_after_in_seconds_and_as_a_date(open_http: Open, server: FaultServer, fake_time: FakeTime) -> None:
    server.plan[A].append(faults.status(429, Retry_After=17))
    server.plan[A].append(faults.status(503, Retry_After=email.utils.formatdate(time.time() + 100, usegmt=True)))
    server.plan[A].append(faults.status(503, Retry_After="soon"))
    assert open_http(first_wait_s=1).read("a.tar", 0, 3) == DATA[:3]
    assert fake_time.waits == [17, pytest.approx(100, abs=60), 4]


HEALS = {
    "reset": (faults.reset, "the connection was broken"),
    "short": (faults.short, "the body ended early"),
    "short_and_says_so": (faults.short_and_says_so, "of body for Content-Range"),
    "wrong_range": (faults.wrong_range, "Content-Range 'bytes 8-57"),
    "without_content_range": (faults.without_content_range, "with Content-Range ''"),
    "too_long": (faults.too_long, "longer than its Content-Range"),
    "stall": (faults.stall, "no data within 0.2 s"),
    "silent": (faults.silent, "no data within 0.2 s"),
}


@pytest.mark.parametrize("fault", HEALS)
def test_a_fault_that_passes_is_survived(open_http: Open, server: FaultServer, fault: str) -> None:
    server.plan[A].append(HEALS[fault][0])
    storage = open_http(read_timeout_s=0.2)
    assert storage.read("a.tar", 7, 50) == DATA[7:57]
    assert storage.read("a.tar", 100, 50) == DATA[100:150], "the connection is not left with a rest"
    assert storage.counters.as_dict()["retries"] == 1


@pytest.mark.parametrize("fault", HEALS)
def test_a_fault_that_stays_is_named_with_the_same_words_by_all(
    open_http: Open, server: FaultServer, fault: str
) -> None:
    server.always[A] = HEALS[fault][0]
    messages = set()
    for attempts in (2, 3):  # ranks do not all get to the same number of attempts
        with pytest.raises(FetchError) as caught:
            open_http(read_timeout_s=0.2, attempts=attempts).read("a.tar", 7, 50)
        messages.add(str(caught.value))
        assert caught.value.attempts == attempts
    (message,) = messages
    assert message.startswith(f"{server.url}{A}: could not be fetched: ")
    assert HEALS[fault][1] in message
    assert "What to do" in message


def test_a_server_that_drips_meets_the_deadline(open_http: Open, server: FaultServer) -> None:
    server.plan[A].append(faults.drip)
    storage = open_http(read_timeout_s=60, deadline_s=0.2, first_wait_s=0)
    assert storage.read("a.tar", 0, 50_000) == DATA[:50_000]
    assert storage.counters.as_dict()["retries"] == 1
    server.always[A] = faults.drip
    with pytest.raises(FetchError, match="the body came too slowly"):
        open_http(read_timeout_s=60, deadline_s=0.2, attempts=1).read("a.tar", 0, 50_000)


def test_one_bad_part_is_repeated_alone(open_http: Open, server: FaultServer) -> None:
    server.plan[A].append(faults.reset)
    assert open_http(part_bytes=20_000).read("a.tar", 0, len(DATA)) == DATA
    assert len(server.requests) == 5 + 1


@pytest.mark.parametrize("behaviour", [faults.ignores_range, faults.ignores_range_without_length])
def test_a_server_without_ranges_is_read_all_the_same(
    open_http: Open, server: FaultServer, behaviour: faults.Behaviour
) -> None:
    server.always[A] = behaviour
    storage = open_http(part_bytes=30_000)
    assert storage.read("a.tar", 40_000, 10) == DATA[40_000:40_010]
    assert storage.read("a.tar") == DATA
    before = len(server.requests)
    assert storage.read("a.tar", 5, 90_000) == DATA[5:90_005]
    assert len(server.requests) == before + 1, "parts of a file that comes whole would be fetched many times over"
    assert storage.size("a.tar") == len(DATA)


def test_compressed_answers_are_refused(open_http: Open, server: FaultServer) -> None:
    server.always[A] = faults.gzipped
    with pytest.raises(FetchError, match="gzip although asked for plain bytes"):
        open_http().read("a.tar", 0, 3)
    assert server.headers[0]["accept-encoding"] == "identity"


def test_redirects_keep_the_range(open_http: Open, server: FaultServer) -> None:
    server.always["/set/x.tar"] = faults.redirect("/set/y.tar")
    server.always["/set/y.tar"] = faults.redirect(f"{server.url}{A}")
    assert open_http().read("x.tar", 10, 20) == DATA[10:30]
    assert server.requests[-1] == (A, "bytes=10-29")


def test_a_circle_of_redirects_fails_at_once(open_http: Open, server: FaultServer, fake_time: FakeTime) -> None:
    server.always[A] = faults.redirect(A)
    with pytest.raises(FetchError, match="more than 5 redirects"):
        open_http().read("a.tar", 0, 1)
    assert fake_time.waits == []


def test_refused_connections_and_unknown_hosts(open_http: Open, fake_time: FakeTime) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening
        with pytest.raises(FetchError, match="cannot be reached or refused") as caught:
            open_http(f"http://127.0.0.1:{unused.getsockname()[1]}/x", attempts=3).read("a", 0, 1)
    assert caught.value.attempts == 3
    with pytest.raises(FetchError, match=r"^http://nowhere\.invalid/x/a: .*could not be resolved"):
        open_http("http://nowhere.invalid/x", attempts=2).read("a", 0, 1)
    assert not re.search("0x[0-9a-f]{6}|:[0-9]{5}.*:[0-9]{5}", str(caught.value))


def test_secrets_of_the_url_are_sent_and_not_shown(open_http: Open, server: FaultServer) -> None:
    storage = open_http(server.url.replace("://", "://me:pass%20word@") + "/set/?sig=hush")
    assert storage.read("a.tar", 0, 1) == DATA[:1]
    assert server.headers[0]["query"] == "sig=hush"
    assert server.headers[0]["authorization"] == "Basic " + base64.b64encode(b"me:pass word").decode()
    with pytest.raises(MissingDataError) as caught:
        storage.read("none.tar")
    for secret in ("hush", "me:", "word"):
        assert secret not in str(caught.value) + storage.url


@pytest.mark.parametrize("behaviour", [faults.stall, faults.silent])
def test_close_ends_requests_in_flight(open_http: Open, server: FaultServer, behaviour: faults.Behaviour) -> None:
    server.always[A] = behaviour
    storage = open_http(read_timeout_s=10_000, part_bytes=30_000)
    errors: list[str] = []

    def read() -> None:
        try:
            storage.read("a.tar", 0, len(DATA))
        except FetchError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(4):
        server.arrived.get()
    storage.close()
    thread.join()
    assert errors == [f"{server.url}{A}: reading was ended because the storage or the cache was closed."]
    with pytest.raises(FetchError, match="closed"):
        storage.read("a.tar", 0, len(DATA))
    assert not [t for t in threading.enumerate() if t.name == "fetch-part"]


def test_a_proxy_of_the_environment_is_used(
    open_http: Open, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.files["http://data.invalid/set/a.tar"] = DATA  # what a proxy is asked for
    assert open_http("http://data.invalid/set").read("a.tar", 1, 4) == DATA[1:5]
