"""Real processes killed in the middle of asynchronous saves: a whole checkpoint is always chosen, training goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from support.toy_training import Log, ToyEngine, check_content, toy_trainer

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore, verify

STEPS = 6
RANK_FILE_BYTES = 64 * 512 * 4 // 2 + 300  # half of the weight, and a header
SEEDS = range(8)


def die_after(total: int) -> None:
    """This process dies by SIGKILL when it has written ``total`` bytes of rank files: its last file is torn there."""
    from pretrain.checkpoint import rank_file

    put = rank_file._put
    left = total

    def put_or_die(stream: Any, state: Any, data: Any) -> None:
        nonlocal left
        data = memoryview(data).cast("B")
        if len(data) >= left:
            put(stream, state, data[:left])
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        left -= len(data)
        put(stream, state, data)

    rank_file._put = put_or_die


class FileLog(Log):
    """Events that outlive the process."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"event": event, **fields}) + "\n")


def train(root: Path, rank: int, port: int, die_at: int | None) -> None:
    """One of two ranks, saving at every step."""
    import torch

    from pretrain.parallel.process import ProcessEnvironment, join_process_group

    torch.set_num_threads(1)
    join_process_group(ProcessEnvironment(rank, 2, rank, 0, 1, "127.0.0.1", port, 1), torch.device("cpu"))
    if die_at is not None:
        die_after(die_at)
    log = FileLog(root / f"events_{rank}.jsonl")
    toy_trainer(root / "checkpoints", log, rank, 2, steps=STEPS, checkpoint_interval=1, keep_checkpoints=2).run()


def run_until_a_rank_dies(root: Path, victim: int, die_at: int) -> None:
    """Two fresh processes; the other one is stopped too, as a launcher would."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.toy_training", "hypothesis"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=train, args=(root, rank, port, die_at if rank == victim else None)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    wait([process.sentinel for process in processes], timeout=300)
    for process in processes:
        if process is not processes[victim]:
            process.kill()
        process.join(300)
    assert processes[victim].exitcode == -signal.SIGKILL


@pytest.mark.distributed
@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_at_a_random_byte_leaves_a_whole_checkpoint_to_choose(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    victim = draw.randrange(2)
    # From the first byte of the first save to the last of the last.
    die_at = draw.randrange(1, STEPS * RANK_FILE_BYTES - 600)
    run_until_a_rank_dies(tmp_path, victim, die_at)

    store = CheckpointStore(tmp_path / "checkpoints")
    for step in store.steps():
        verify(store.path(step))
        check_content(store.path(step))
    published = published_steps(tmp_path / "events_0.jsonl")
    torn = die_at // RANK_FILE_BYTES + 1
    chosen = store.latest()
    if chosen is None:
        # Nothing was ever published before the kill.
        assert (published, store.steps()) == ([], [])
    else:
        # Never the torn one; and nothing that was announced is lost, but for a last announcement cut off by the kill.
        step = CheckpointReader(chosen).training["step"]
        assert step < torn
        assert step in {*published[-1:], (published or [0])[-1] + 1}
    store.sweep()
    left = {"latest", *(store.path(step).name for step in store.steps())} if store.steps() else set()
    assert {entry.name for entry in store.root.iterdir()} == left

    # The next start continues from it, on another number of ranks, and ends where an undisturbed run ends.
    step = CheckpointReader(chosen).training["step"] if chosen else 0
    toy_trainer(store.root, Log(), engine=ToyEngine(0, 1, step), steps=STEPS, checkpoint_interval=1).run()
    assert store.latest() == store.path(STEPS)
    verify(store.path(STEPS))
    check_content(store.path(STEPS))


def published_steps(path: Path) -> list[int]:
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["step"] for record in records if record["event"] == "checkpoint"]
