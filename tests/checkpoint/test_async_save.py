"""Asynchronous saving through the real loop: what training waits for, when a checkpoint appears, how it fails."""

from __future__ import annotations

import math
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saving import Gather, new_save, whole
from support.toy_training import Log, ToyEngine, check_content, state_at, toy_trainer

from launchers.lease import FencedError
from pretrain.checkpoint import rank_file
from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.manifest import CheckpointSaveError
from pretrain.checkpoint.rank_file import HostMemory, Snapshot, write_rank_file
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore, verify
from pretrain.parallel.shard import Shard
from pretrain.training import callbacks, loop
from pretrain.training.loop import NonFiniteError


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No snapshot is written before the event is set."""
    released = threading.Event()
    write = Snapshot.write

    def wait_and_write(self: Snapshot, path: Path) -> Any:
        assert released.wait(60)
        return write(self, path)

    monkeypatch.setattr(Snapshot, "write", wait_and_write)
    yield released
    released.set()


def test_training_goes_on_while_the_disk_is_slow(tmp_path: Path, slow_disk: threading.Event) -> None:
    seen = []

    def during_step(step: int) -> None:
        seen.append((step, CheckpointStore(tmp_path).steps()))
        if step == 4:
            slow_disk.set()
            trainer.callbacks[0]._pending.save._thread.join()  # type: ignore[attr-defined]

    log = Log()
    trainer = toy_trainer(
        tmp_path, log, engine=ToyEngine(0, 1, during_step=during_step), steps=6, checkpoint_interval=2
    )
    trainer.run()
    # Saved after step 2; the disk gave in during step 4, whose end is the time of the next save, which waits for it.
    assert seen[:4] == [(1, []), (2, []), (3, []), (4, [])]
    assert seen[4][1][:1] == [2]
    assert CheckpointStore(tmp_path).steps() == [2, 4, 6]
    for step in (2, 4, 6):
        verify(CheckpointStore(tmp_path).path(step))
        check_content(CheckpointStore(tmp_path).path(step))
    assert [event["step"] for event in log.of("checkpoint")] == [2, 4, 6]
    for event in log.of("checkpoint"):
        files = CheckpointReader(Path(event["path"])).manifest.files
        assert event["bytes"] == sum(file["bytes"] for file in files.values())
        assert 0 < event["stall_s"] <= event["seconds"]
        assert event["write_s"] > 0


def test_publishing_waits_for_a_step_boundary_and_costs_no_collective_until_then(
    tmp_path: Path, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sums, gather = loop.all_reduce_floats, callbacks.gather_objects
    monkeypatch.setattr(loop, "all_reduce_floats", lambda values: calls.append("sum") or sums(values))
    monkeypatch.setattr(callbacks, "gather_objects", lambda value: calls.append("gather") or gather(value))
    by_step: dict[int, list[str]] = {}

    def during_step(step: int) -> None:
        by_step[step], calls[:] = list(calls), []
        if step == 6:
            slow_disk.set()
            trainer.callbacks[0]._pending.save._thread.join()  # type: ignore[attr-defined]

    trainer = toy_trainer(
        tmp_path, Log(), engine=ToyEngine(0, 1, during_step=during_step), steps=9, checkpoint_interval=3
    )
    trainer.run()
    # The calls since the step before: what its callbacks did, and this step's two sums, the second at the gate.
    ordinary = ["sum", "sum"]
    assert by_step[2] == by_step[3] == by_step[5] == by_step[6] == ordinary
    assert by_step[4] == ["gather", "sum", "sum"]  # agreeing on a folder and a snapshot
    assert by_step[7] == ["gather", "gather", "gather", "sum", "sum"]  # publishing step 3, starting step 6


def test_a_synchronous_save_streams_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "take", lambda *args: pytest.fail("a synchronous save needs no snapshot"))
    seen = []
    engine = ToyEngine(0, 1, during_step=lambda step: seen.append(CheckpointStore(tmp_path).steps()))
    toy_trainer(tmp_path, Log(), engine=engine, steps=3, checkpoint_interval=1, async_checkpoints=False).run()
    assert seen == [[], [1], [1, 2]]
    for step in (1, 2, 3):
        check_content(CheckpointStore(tmp_path).path(step))


def test_both_ways_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of 64 bytes: tensors begin and end anywhere in them.
    monkeypatch.setattr(rank_file, "_CHUNK_BYTES", 64)
    values = torch.randn(50)
    fragments = [
        whole("a", "buffer", torch.arange(5, dtype=torch.uint8)),
        whole("b", "weight", torch.randn(7, 3).to(torch.bfloat16)),
        whole("c", "buffer", torch.tensor([True])),
        Fragment("d", "master", (10, 10), 0, values, Shard.split((10, 10), 1, 1, 2)),
        Fragment("d", "master", (10, 10), 50, values[:0], Shard.split((10, 10), 1, 1, 2)),
        whole("e", "buffer", torch.zeros(0)),
    ]
    streamed, pieces = write_rank_file(tmp_path / "streamed", fragments)
    memory = HostMemory()
    memory.take([whole("x", "master", torch.randn(200))], "earlier")  # what an earlier save leaves behind
    snapshot = memory.take(iter(fragments), "streamed")
    for fragment in fragments:
        fragment.values.zero_()
    assert snapshot.write(tmp_path / "behind") == streamed
    assert (tmp_path / "behind").read_bytes() == (tmp_path / "streamed").read_bytes()
    assert snapshot.pieces == pieces


def test_a_checkpoint_appears_when_the_last_rank_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    write = Snapshot.write

    def second_rank_is_slow(self: Snapshot, path: Path) -> Any:
        assert path.name == "rank_00000.safetensors" or released.wait(60)
        return write(self, path)

    monkeypatch.setattr(Snapshot, "write", second_rank_is_slow)
    gather = Gather(2)
    saves = [new_save(tmp_path, 5, rank, gather=gather.of(rank)) for rank in range(2)]
    for_each_rank(
        lambda rank: saves[rank].start([whole("wb"[rank], "master", torch.ones(3))], {"step": 5}, HostMemory())
    )
    assert saves[0]._thread is not None
    saves[0]._thread.join()
    assert [save.ready() for save in saves] == [True, False]
    assert CheckpointStore(tmp_path).steps() == []
    assert CheckpointStore(tmp_path).latest() is None
    released.set()
    for_each_rank(lambda rank: saves[rank].finish())
    verify(CheckpointStore(tmp_path).path(5))


def for_each_rank(action: Any) -> None:
    """Two ranks as threads."""
    threads = [threading.Thread(target=action, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_run_that_meets_a_loss_that_is_no_number_still_gets_its_checkpoint(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    def during_step(step: int) -> None:
        if step == 3:
            trainer.engine.loss = math.nan  # type: ignore[attr-defined]
            slow_disk.set()

    trainer = toy_trainer(
        tmp_path, Log(), engine=ToyEngine(0, 1, during_step=during_step), steps=6, checkpoint_interval=2
    )
    with pytest.raises(NonFiniteError):
        trainer.run()
    assert CheckpointStore(tmp_path).steps() == [2]
    check_content(CheckpointStore(tmp_path).path(2))


def test_a_lease_lost_while_writing_publishes_nothing(tmp_path: Path) -> None:
    calls = []

    def fence() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise FencedError("lost to attempt 2")

    trainer = toy_trainer(tmp_path, Log(), steps=5, checkpoint_interval=1, fence=fence)
    with pytest.raises(CheckpointSaveError, match="lost to attempt 2") as caught:
        trainer.run()
    assert isinstance(caught.value.__cause__, FencedError)
    assert CheckpointStore(tmp_path).steps() == []


def run_on_a_full_disk(rank: int, size: int, root: Path, victim: int) -> tuple[str, list[str]]:
    """One rank's file system takes no more than a part of its second file (a limit of the kernel, not a mock)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def during_step(step: int) -> None:
        if step == 3 and rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))

    log = Log()
    engine = ToyEngine(rank, size, during_step=during_step)
    trainer = toy_trainer(root, log, rank, size, engine=engine, steps=10, checkpoint_interval=2)
    try:
        trainer.run()
    except CheckpointSaveError as error:
        return str(error), [event["step"] for event in log.of("checkpoint")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "", []


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_fails_every_rank_together(tmp_path: Path, worker_pools: Any, victim: int) -> None:
    outcomes = worker_pools(2).run(run_on_a_full_disk, tmp_path, victim)
    assert all(f"rank {victim}: OSError: [Errno 27] File too large" in message for message, _ in outcomes)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == [2]
    # What was saved before is whole and chosen; of the failed one nothing is left.
    store = CheckpointStore(tmp_path)
    assert (store.steps(), store.latest()) == ([2], store.path(2))
    verify(store.path(2))
    check_content(store.path(2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000002"]


def run_together(rank: int, size: int, root: Path) -> list[int]:
    log = Log()
    toy_trainer(root, log, rank, size, steps=7, checkpoint_interval=1, keep_checkpoints=3, keep_every=2).run()
    return [event["step"] for event in log.of("checkpoint")]


@pytest.mark.distributed
def test_ranks_publish_every_checkpoint_together(tmp_path: Path, worker_pools: Any) -> None:
    events = worker_pools(2).run(run_together, tmp_path)
    assert events == [[1, 2, 3, 4, 5, 6, 7]] * 2
    store = CheckpointStore(tmp_path)
    assert store.steps() == [2, 4, 5, 6, 7]
    for step in store.steps():
        verify(store.path(step))
        check_content(store.path(step))
    assert len(CheckpointReader(store.path(7)).manifest.files) == 2
    assert torch.equal(CheckpointReader(store.path(7)).tensor("w", "master"), state_at(7))


def test_the_best_by_validation_stay_and_are_known_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 1.5}

    def evaluate(engine: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"validation_loss": losses[engine.step]}

    monkeypatch.setattr(callbacks, "evaluate", evaluate)
    store = CheckpointStore(tmp_path)

    def run(first: int, last: int) -> None:
        evaluation = callbacks.EvaluationCallback(Log(), None)
        toy_trainer(
            tmp_path,
            Log(),
            engine=ToyEngine(0, 1, first),
            more=[evaluation],
            steps=last,
            checkpoint_interval=2,
            eval_interval=2,
            keep_checkpoints=1,
            keep_best=2,
        ).run()

    run(0, 8)
    assert store.steps() == [4, 6, 8]  # 8 is the newest
    run(8, 10)
    # The last validation comes after the last save, and still counts: 10 takes the place of 6.
    assert store.steps() == [4, 10]
    assert store.scores() == losses
