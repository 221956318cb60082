"""The retry policy: how long it waits, when it gives up, what it says."""

from __future__ import annotations

import threading

import pytest
from fetch_support import FakeTime
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import FetchError
from data_pipeline.fetch.counters import fetch_counters
from data_pipeline.fetch.retry import Retry, TransientError
from data_pipeline.fetch.settings import FetchSettings


def failing(times: int, retry_after_s: float = 0.0):
    """An action that fails ``times`` times, then gives 7."""
    left = [times]

    def action() -> int:
        if left[0]:
            left[0] -= 1
            raise TransientError("HTTP 503", retry_after_s)
        return 7

    return action


def policy(time: FakeTime, jitter: float = 1.0, **settings: float) -> Retry:
    return Retry(
        FetchSettings(**settings),  # type: ignore[arg-type]
        fetch_counters(),
        clock=time.clock,
        sleep=time.sleep,
        jitter=lambda: jitter,
    )


def test_waits_double_up_to_the_longest() -> None:
    time = FakeTime()
    assert policy(time, first_wait_s=1, longest_wait_s=5).call(failing(5), "u") == 7
    assert time.waits == [1, 2, 4, 5, 5]


@given(st.floats(0, 0.999), st.integers(0, 11))
def test_jitter_is_full_and_scales_the_wait(jitter: float, times: int) -> None:
    time = FakeTime()
    assert policy(time, jitter, first_wait_s=0.5, longest_wait_s=30).call(failing(times), "u") == 7
    assert time.waits == pytest.approx([jitter * min(30, 0.5 * 2**n) for n in range(times)])


def test_the_servers_wish_counts_when_it_is_longer() -> None:
    time = FakeTime()
    policy(time, first_wait_s=1).call(failing(1, retry_after_s=20), "u")
    policy(time, first_wait_s=1).call(failing(1, retry_after_s=0.1), "u")
    assert time.waits == [20, 1]


@pytest.mark.parametrize(
    ("settings", "attempts"),
    [({"attempts": 4}, 4), ({"attempts": 1}, 1), ({"deadline_s": 10, "first_wait_s": 1, "attempts": 99}, 4)],
)
def test_attempts_and_deadline_end_it_with_one_message(settings: dict[str, float], attempts: int) -> None:
    time = FakeTime()
    with pytest.raises(FetchError, match=r"^http://host/x: could not be fetched: HTTP 503. What to do: ") as caught:
        policy(time, **settings).call(failing(1000), "http://host/x")
    assert caught.value.attempts == attempts
    assert caught.value.url == "http://host/x"
    assert caught.value.seconds == sum(time.waits) < 10
    # Counts and times differ from rank to rank: they are notes, not part of the message.
    assert f"{attempts} attempts" in caught.value.__notes__[0]


def test_a_wish_beyond_the_deadline_fails_without_waiting() -> None:
    time = FakeTime()
    with pytest.raises(FetchError):
        policy(time, deadline_s=60).call(failing(1, retry_after_s=3600), "u")
    assert time.waits == []


def test_other_errors_leave_at_once() -> None:
    time = FakeTime()

    def action() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        policy(time).call(action, "u")
    assert time.waits == []


@pytest.mark.parametrize("close_it", [True, False])
def test_closing_or_cancelling_ends_a_wait(close_it: bool) -> None:
    retry = Retry(
        FetchSettings(first_wait_s=1e6, longest_wait_s=1e6, deadline_s=1e9), fetch_counters(), jitter=lambda: 1.0
    )
    cancelled, failed_once, errors = threading.Event(), threading.Event(), []

    def action() -> None:
        failed_once.set()
        raise TransientError("HTTP 503")

    def call() -> None:
        try:
            retry.call(action, "u", cancelled)
        except FetchError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    failed_once.wait()
    if close_it:
        retry.close()
    else:
        cancelled.set()
        retry.wake()
    thread.join()
    assert errors == ["u: reading was ended because the storage or the cache was closed."]


def test_all_wrong_settings_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"attempts is 0.*part_bytes is -1.*longest_wait_s is -2.*given together"):
        FetchSettings(attempts=0, part_bytes=-1, longest_wait_s=-2, s3_access_key_id="x")


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, 64),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_TASKS_PER_NODE": "4(x2),3"}, 16),
        ({"SLURM_NTASKS_PER_NODE": "100"}, 1),
    ],
)
def test_processes_of_a_node_share_the_cap_on_requests(environment: dict[str, str], share: int) -> None:
    assert FetchSettings().requests_in_flight(environment) == share
    assert FetchSettings(processes_per_node=2).requests_in_flight(environment) == 32


def test_secrets_are_not_shown() -> None:
    assert "hush" not in repr(
        FetchSettings(s3_access_key_id="hush", s3_secret_access_key="hush", s3_session_token="hush")
    )
