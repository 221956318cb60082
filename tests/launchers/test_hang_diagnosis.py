"""Who holds up an attempt, by the last heartbeats alone; and when the watch calls it a hang."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers.hang import Watch, diagnose
from launchers.hang_report import data_stack, main_stack, write_report
from launchers.heartbeat import Collective, Heartbeat, heartbeat_path, read_heartbeats, write_heartbeat
from launchers.lifecycle.journal import append
from launchers.run_dir import RunDir
from pretrain.config.schema import Config, LifecycleConfig, LocalConfig


def beat(rank: int, phase: str = "all-reduce", *, step: int | None = 5, since: float = 100.0, **more: Any) -> Heartbeat:
    base = Heartbeat(
        rank=rank, host="h", node=f"n{rank // 2}", pid=100 + rank, time=200.0, phase=phase, phase_since=since,
        progress=10, step=step, steps=3,
    )  # fmt: skip
    return replace(base, **more)


def within(
    count: int, group: str = "gloo default", name: str = "all_reduce", ranks: tuple[int, ...] = ()
) -> dict[str, Any]:
    """In collective ``count`` of a group, and no other on record."""
    return {
        "collective": Collective(name, count, 100.0, group, running=True, ranks=list(ranks)),
        "counts": {group: count},
    }


def after(count: int, group: str = "gloo default") -> dict[str, Any]:
    return {"collective": Collective("all_reduce", count, 90.0, group, running=False), "counts": {group: count}}


def test_the_rank_that_is_in_no_collective_is_named() -> None:
    hang = diagnose([beat(0, **within(7)), beat(1, **within(7)), beat(2, "data", **after(6))], 3, {})
    assert (hang.rank, hang.node, hang.phase, hang.culprits) == (2, "n1", "data", [2])
    assert hang.reason == (
        "rank 2 on n1, in phase data after step 5, is in no collective while ranks 0, 1 wait in all_reduce no. 7 of "
        "gloo default"
    )


def test_only_members_of_a_group_are_blamed_for_it() -> None:
    # Tensor-parallel pairs (0, 1) and (2, 3): rank 0 waits for rank 1 alone; 2 and 3 compute.
    beats = [
        beat(0, "forward", **within(40, "nccl group 1", ranks=(0, 1))),
        beat(1, "forward", **after(39, "nccl group 1")),
        beat(2, "forward", **after(41, "nccl group 2")),
        beat(3, "forward", **after(41, "nccl group 2")),
    ]
    assert diagnose(beats, 4, {}).culprits == [1]


def test_a_chain_of_groups_leads_to_the_rank_that_waits_for_nobody() -> None:
    # 0 waits for 1, which waits for 2, which is in a loop.
    beats = [
        beat(0, **within(8, "gloo group 1", ranks=(0, 1))),
        beat(1, **within(3, "gloo group 2", ranks=(1, 2))),
        beat(2, "forward", **after(2, "gloo group 2")),
    ]
    assert diagnose(beats, 3, {}).rank == 2


def test_ranks_in_different_collectives() -> None:
    lonely = {**within(2, "gloo group 4"), "counts": {"gloo group 4": 2, "gloo default": 6}}
    hang = diagnose(
        [beat(0, **within(7)), beat(1, "save", **lonely), beat(2, **within(7)), beat(3, **within(7))], 4, {}
    )
    assert hang.rank == 1
    assert "is in all_reduce no. 2 of gloo group 4 while ranks 0, 2, 3 wait in all_reduce no. 7" in hang.reason


def test_the_same_number_under_another_name_is_a_mismatch() -> None:
    hang = diagnose([beat(0, **within(7)), beat(1, **within(7)), beat(2, **within(7, name="broadcast"))], 3, {})
    assert hang.rank == 2
    assert "is in broadcast no. 7" in hang.reason


def test_nobody_is_blamed_when_all_wait_in_the_same_collective() -> None:
    hang = diagnose([beat(0, **within(7)), beat(1, **within(7))], 2, {})
    assert hang.rank is None
    assert "none is missing: the connection between nodes, or a device, does not answer" in hang.reason


def test_silence_comes_before_collectives() -> None:
    hang = diagnose([beat(0, "forward", **after(6)), beat(1, **within(7)), beat(2)], 3, {2: 61.0})
    assert (hang.rank, hang.silent) == (2, [2])
    assert "has not told of itself for 61 s while others did" in hang.reason


def test_all_silent_ranks_point_at_what_they_share() -> None:
    hang = diagnose([beat(0), beat(1)], 2, {0: 61.0, 1: 61.0})
    assert hang.rank is None
    assert "file system" in hang.reason


def test_a_rank_alone_is_its_own_culprit() -> None:
    assert diagnose([beat(0, "forward")], 1, {}).rank == 0
    assert diagnose([beat(0, "forward")], 1, {0: 61.0}).reason.startswith(
        "rank 0 on n0, in phase forward after step 5, has not told of itself for 61 s: it is dead"
    )


def test_without_a_flight_recorder_the_rank_behind_or_the_first_to_stop_is_named() -> None:
    assert diagnose([beat(0, step=6), beat(1, step=5), beat(2, step=6)], 3, {}).rank == 1
    assert diagnose([beat(0, since=101.0), beat(1, "data", since=99.5), beat(2, since=101.2)], 3, {}).rank == 1


def test_ranks_that_never_told_of_themselves() -> None:
    hang = diagnose([beat(0, "start", step=None, steps=0)], 3, {})
    assert (hang.rank, hang.culprits, hang.silent) == (1, [1, 2], [1, 2])
    assert "never told of itself" in hang.reason
    assert diagnose([], 3, {}).rank is None


class Clock:
    """A watch over ranks whose beats the test writes, on a clock that the test moves."""

    def __init__(self, run: RunDir, size: int) -> None:
        lifecycle = LifecycleConfig(heartbeat_interval_s=1.0, hang_timeout_s=60.0, startup_timeout_s=300.0)
        self.run = run
        self.now = 1000.0
        self.watch = Watch(run, 1, Config(lifecycle=lifecycle, launcher=LocalConfig(num_processes=size)))
        run.heartbeats_path(1).mkdir(parents=True)

    def tell(self, *beats: Heartbeat) -> None:
        for told in beats:
            write_heartbeat(heartbeat_path(self.run, 1, told.rank), told)

    def after(self, seconds: float) -> Any:
        """Looks every second, as a supervisor does; the first hang that is found."""
        until = self.now + seconds
        while True:
            self.now = min(until, self.now + 1.0)
            if (hang := self.watch.poll(self.now)) is not None or self.now == until:
                return hang

    def suspended(self, seconds: float) -> Any:
        self.now += seconds
        return self.watch.poll(self.now)


def test_progress_of_any_rank_puts_a_hang_off_and_time_without_it_counts(run: RunDir) -> None:
    clock = Clock(run, 2)
    clock.tell(beat(0), beat(1))
    assert clock.after(58) is None
    clock.tell(beat(0, time=259.0), beat(1, time=259.0, progress=11))
    assert clock.after(1) is None
    clock.tell(beat(0, time=318.0), beat(1, time=318.0, progress=11))
    assert clock.after(59) is None
    clock.tell(beat(0, time=320.0), beat(1, time=320.0, progress=11))
    hang = clock.after(1)
    assert hang is not None
    assert hang.seconds == 60
    assert hang.silent == []


def test_time_in_which_the_job_was_suspended_does_not_count(run: RunDir) -> None:
    clock = Clock(run, 2)
    clock.tell(beat(0), beat(1))
    assert clock.after(40) is None
    for _ in range(3):
        assert clock.suspended(3600) is None
    assert list(clock.watch.silent(clock.now)) == [0, 1]  # for the 40 s before alone
    clock.tell(beat(0, time=259.0), beat(1, time=259.0))
    assert clock.after(15) is None
    assert clock.watch.silent(clock.now) == {}
    # What stood still before and after is one hang.
    hang = clock.after(10)
    assert hang is not None
    assert 55 < hang.seconds < 62


def test_before_the_first_beat_a_suspension_does_not_count_either(run: RunDir) -> None:
    clock = Clock(run, 2)
    assert clock.after(200) is None
    assert clock.suspended(3600) is None
    assert clock.after(90) is None
    assert clock.after(20) is not None


def test_clocks_of_ranks_may_be_wrong(run: RunDir) -> None:
    clock = Clock(run, 2)
    for second in range(100):
        # An hour ahead, and running backwards.
        clock.tell(beat(0, time=4600.0 + second, progress=second), beat(1, time=900.0 - second, progress=second))
        assert clock.after(1) is None
    assert clock.watch.silent(clock.now) == {}


def test_before_the_first_step_the_time_of_start_up_counts(run: RunDir) -> None:
    clock = Clock(run, 1)
    assert clock.after(250) is None
    clock.tell(beat(0, "start", step=40, steps=0))
    assert clock.after(1) is None
    assert clock.after(290) is None
    clock.tell(beat(0, "start", step=40, steps=0, time=201.0))
    assert clock.after(15) is not None


def test_a_rank_that_never_starts_is_found_and_its_node_comes_from_the_journal(run: RunDir) -> None:
    append(run, "attempt_started", attempt=1, launcher="slurm", job="7", nodes=["a", "b"], num_processes=4)
    clock = Clock(run, 4)
    clock.tell(beat(0, steps=0), beat(1, steps=0), beat(3, steps=0))
    assert clock.after(0) is None
    hang = clock.after(301)
    assert (hang.rank, hang.node) == (2, "b")


def test_a_rank_that_ended_is_not_silent(run: RunDir) -> None:
    clock = Clock(run, 2)
    clock.tell(beat(0, "stop"), beat(1))
    clock.after(0)
    clock.after(31)
    assert list(clock.watch.silent(clock.now)) == [1]


def test_files_are_not_read_at_every_look(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(run, 1)
    reads = []

    def read(run: RunDir, attempt: int) -> list[Heartbeat]:
        reads.append(attempt)
        return []

    monkeypatch.setattr("launchers.hang.read_heartbeats", read)
    for _ in range(100):
        clock.after(0.01)
    assert len(reads) == 2


def test_a_beat_comes_back_as_it_was_written_and_damage_is_left_out(run: RunDir) -> None:
    folder = run.heartbeats_path(2)
    folder.mkdir(parents=True)
    told = [beat(0, **within(7, ranks=(0, 1))), beat(1, detail="loading", stopping="SIGTERM", step=None)]
    for each in told:
        write_heartbeat(heartbeat_path(run, 2, each.rank), each)
    (folder / "rank_00002.json").write_text('{"rank": 2, "ho')
    (folder / "rank_00003.json").write_text('{"rank": 3}')
    assert read_heartbeats(run, 2) == told
    assert read_heartbeats(run, 9) == []
    newer = json.loads((folder / "rank_00001.json").read_text()) | {"of_a_later_version": 1}
    (folder / "rank_00001.json").write_text(json.dumps(newer))
    assert read_heartbeats(run, 2) == told
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_a_page_without_stacks_or_recorder_still_names_the_culprit(run: RunDir) -> None:
    beats = [beat(rank, **within(7)) for rank in range(40) if rank != 17] + [beat(17, "data", **after(6))]
    hang = diagnose(beats, 40, {}, 600.0)
    page = write_report(run, 3, hang).read_text(encoding="utf-8")
    assert "**Culprit: rank 17 on n8, in phase data" in page
    assert "nothing had moved for 10 min 0 s" in page
    assert "| **culprit** | 17 | n8 | 117 | 5 | data | 100 s | last: all_reduce no. 6 of gloo default |" in page
    assert "28 more" in page
    assert "No stack: the process is dead or frozen" in page
    assert len(page.splitlines()) < 70, "one page"


def test_the_main_thread_is_the_last_of_the_last_dump(tmp_path: Path) -> None:
    path = tmp_path / "stacks.txt"
    first = 'Current thread 0x00007f4 (most recent call first):\n  File "a.py", line 1 in old\n'
    second = (
        'Thread 0x00007f3 (most recent call first):\n  File "h.py", line 9 in beat\n\n'
        "Current thread 0x00007f4 (most recent call first):\n"
        '  File "b.py", line 2 in stuck\n  File "b.py", line 7 in main\n'
    )
    path.write_text(first)
    assert main_stack(path) == ['File "a.py", line 1 in old']
    assert main_stack(path, len(first)) == []
    path.write_text(first + second)
    assert main_stack(path, len(first)) == ['File "b.py", line 2 in stuck', 'File "b.py", line 7 in main']
    assert main_stack(tmp_path / "none") == []
    assert data_stack(path) == []
    fetching = (
        'Thread 0x00007f2 (most recent call first):\n  File "s3.py", line 4 in read\n'
        '  File "/x/data_pipeline/loader.py", line 260 in _produce\n\n'
    )
    path.write_text(fetching + second)
    assert data_stack(path)[0] == 'File "s3.py", line 4 in read'
