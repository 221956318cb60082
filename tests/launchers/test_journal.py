"""The journal of a run: whole lines in order, whoever writes them and whatever a crash left."""

from __future__ import annotations

import multiprocessing

from launchers.lifecycle.cancellation import read, request, withdraw
from launchers.lifecycle.journal import append, last_entry, read_journal
from launchers.run_dir import RunDir


def test_events_are_read_back_in_order(run: RunDir) -> None:
    assert read_journal(run) == []
    append(run, "submitted", job=7, script="slurm/job_0001.sbatch", kind="first", exclude=[])
    append(run, "attempt_started", attempt=1, launcher="slurm", job=7, nodes=["n1"], num_processes=2)
    first, second = read_journal(run)
    assert (first["event"], first["job"], second["nodes"]) == ("submitted", 7, ["n1"])
    assert first["time"] <= second["time"]
    assert last_entry(read_journal(run), "submitted") == first
    assert last_entry(read_journal(run), "requeued") is None


def test_a_torn_line_is_closed_and_passed_over(run: RunDir) -> None:
    append(run, "cancelled", job=None)
    with open(run.lifecycle_path, "a") as stream:
        stream.write('{"time": 1, "event": "attempt_st')
    append(run, "requeued", job=3, exclude=["n2"])
    assert [entry["event"] for entry in read_journal(run.path)] == ["cancelled", "requeued"]


def _write(path: str, writer: int) -> None:
    run = RunDir.open(path)
    for number in range(50):
        append(run, "requeued", job=writer, exclude=[str(number)] * 50)


def test_lines_of_several_writers_do_not_mix(run: RunDir) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(run.path), writer)) for writer in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    entries = read_journal(run)
    assert len(entries) == 150
    for writer in range(3):
        own = [entry["exclude"][0] for entry in entries if entry["job"] == writer]
        assert own == [str(number) for number in range(50)]


def test_a_wish_to_cancel_is_left_read_and_withdrawn(run: RunDir) -> None:
    assert read(run) is None
    assert not withdraw(run)
    wish = request(run, now=True)
    assert read(run) == wish
    run.cancel_path.write_text("{torn")
    damaged = read(run)
    assert damaged is not None
    assert not damaged.now  # in doubt with a checkpoint
    assert withdraw(run)
    assert read(run) is None
