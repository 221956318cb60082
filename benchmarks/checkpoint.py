"""Checkpoints: what a save costs training, how near it comes to the disk, how fast it loads, what memory it takes.

    python benchmarks/checkpoint.py [--processes 2] [--rounds 5] [--steps 3] [--folder FOLDER]

A transformer of 21 million parameters (252 MB of state) trains on random tokens with the DeepSpeed engine, ZeRO stage
1. Each round has a block of steps without a save, one that begins with a synchronous save, one that begins with an
asynchronous save, and one plain write: every rank writes the bytes of its file again, in pieces of 8 MiB, with fsync.

- stall: seconds for which training stands still for a save, as a share of a step;
- cost: seconds by which the whole block becomes longer, which includes what the background thread takes from the
  cores that also train, as a share of a step;
- write: bytes/s of the rank files (with hashing and fsync) against those of the plain write;
- load: seconds to read the checkpoint from the page cache whole, and as the slowest of four ranks that each read a
  quarter of the columns of every tensor, against reading its files from end to end into one small buffer;
- memory: the peak of a fresh process during a save, less what it held before, against the bytes of its shard.

A ratio is taken within each round; medians and quartiles are reported.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results_file import quartiles, write_result

_PIECE = 8 << 20
_MEMORY_SHARD_BYTES = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps in a block")
    parser.add_argument("--folder", default=None, help="where to write (default: the temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rounds, checkpoint = _train(Path(folder), arguments)
        loads = _loads(checkpoint)
        memory = {mode: _in_fresh_process(_peak_memory, mode, Path(folder)) for mode in ("sync", "async")}
    figures = _figures(rounds, loads, arguments.steps)
    figures |= {f"memory_{mode}_over_shard": {"median": value} for mode, value in memory.items()}
    for name, values in figures.items():
        spread = f"   quartiles {values['low']:.4g} .. {values['high']:.4g}" if "low" in values else ""
        print(f"{name:<32} median {values['median']:>10.4g}{spread}")
    shown = {name: value for name, value in vars(arguments).items() if name != "folder"}
    write_result("checkpoint", {"arguments": shown, "figures": figures, "rounds": rounds, "loads": loads})


def _figures(rounds: list[dict[str, float]], loads: list[dict[str, float]], steps: int) -> dict[str, dict[str, float]]:
    def over(name: str, base: str, factor: float = 1.0) -> dict[str, float]:
        return quartiles([factor * record[name] / record[base] for record in rounds])

    for record in rounds:
        record["step_s"] = record["none_s"] / steps
        for mode in ("sync", "async"):
            record[f"{mode}_cost_s"] = record[f"{mode}_s"] - record["none_s"]
    return {
        "step_s": quartiles([record["step_s"] for record in rounds]),
        "checkpoint_mb": {"median": statistics.median(record["bytes"] for record in rounds) / 1e6},
        "stall_sync_over_step": over("sync_stall_s", "step_s"),
        "stall_async_over_step": over("async_stall_s", "step_s"),
        "stall_async_over_sync": over("async_stall_s", "sync_stall_s"),
        "cost_sync_over_step": over("sync_cost_s", "step_s"),
        "cost_async_over_step": over("async_cost_s", "step_s"),
        "disk_mb_per_s": quartiles([record["bytes"] / record["plain_s"] / 1e6 for record in rounds]),
        "write_sync_over_disk": over("plain_s", "sync_write_s"),
        "write_async_over_disk": over("plain_s", "async_write_s"),
        "load_whole_over_plain_read": quartiles([record["whole_s"] / record["plain_s"] for record in loads]),
        "load_quarter_over_plain_read": quartiles([record["split_s"] / record["plain_s"] for record in loads]),
    }


def _train(folder: Path, arguments: argparse.Namespace) -> tuple[list[dict[str, float]], Path]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, port, folder, vars(arguments), results))
        for rank in range(arguments.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process failed; its error is above")
    rounds, path = results.get()
    return rounds, Path(path)


def _rank(rank: int, port: int, folder: Path, arguments: dict[str, Any], results: Any) -> None:
    import torch
    import torch.distributed as dist

    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.config.schema import (
        Config,
        DeepSpeedConfig,
        LocalConfig,
        OptimizerConfig,
        ScheduleConfig,
        TrainConfig,
    )
    from pretrain.engines.build import build_engine
    from pretrain.models.hybrid.config import HybridConfig
    from pretrain.nn.attention_config import AttentionConfig
    from pretrain.nn.mlp_config import MLPConfig
    from pretrain.objectives.config import NextTokenConfig
    from pretrain.parallel.process import ProcessEnvironment, join_process_group
    from pretrain.training.callbacks import CheckpointCallback
    from pretrain.training.loop import Trainer
    from pretrain.training.signals import StopRequest
    from pretrain.training.state import TrainState

    size = arguments["processes"]
    torch.set_num_threads(1)
    join_process_group(ProcessEnvironment(rank, size, rank, 0, 1, "127.0.0.1", port, 1), torch.device("cpu"))
    blocks = 1 + 3 * arguments["rounds"]
    config = Config(
        train=TrainConfig(
            steps=blocks * arguments["steps"],
            global_batch_size=size,
            micro_batch_size=1,
            checkpoint_interval=0,
            keep_checkpoints=1,
        ),
        model=HybridConfig(
            pattern="*-*-*-*-",
            width=512,
            vocab_size=8192,
            attention=AttentionConfig(num_heads=8),
            mlp=MLPConfig(hidden_size=2048),
        ),
        optimizer=OptimizerConfig(schedule=ScheduleConfig(kind="constant", horizon=1000)),
        engine=DeepSpeedConfig(),
        launcher=LocalConfig(num_processes=size),
    )
    log = _Events()
    checkpoints = CheckpointCallback(
        CheckpointStore(folder / "checkpoints"), log, rank=rank, attempt=1, fence=lambda: None, facts={}
    )
    turns = _turns(checkpoints, log, folder / f"plain_{rank}", arguments["steps"])
    Trainer(
        config=config,
        engine=build_engine(config, torch.device("cpu")),
        objective=NextTokenConfig().build(),
        open_stream=lambda first_batch, skipped: _RandomTokens(rank),
        state=TrainState(),
        stop=StopRequest(),
        callbacks=[turns, checkpoints],
    ).run()
    if rank == 0:
        results.put((turns.rounds, str(log.latest["path"])))
    dist.barrier()
    dist.destroy_process_group()


class _Events:
    """The latest ``checkpoint`` event."""

    latest: dict[str, Any]

    def write(self, event: str, **fields: Any) -> None:
        self.latest = fields


class _RandomTokens:
    """One row of 256 tokens a step."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        import numpy as np

        draw = np.random.default_rng(self._rank)
        shape = (1, 256)
        while True:
            yield [
                {
                    "tokens": draw.integers(8192, size=shape, dtype=np.int32),
                    "targets": draw.integers(8192, size=shape, dtype=np.int32),
                    "loss_mask": np.ones(shape, dtype=bool),
                    "seq_idx": np.zeros(shape, dtype=np.int32),
                    "position_ids": np.arange(256, dtype=np.int32)[None],
                    "sample_ids": np.zeros(1, dtype=np.int64),
                }
            ]

    def close(self) -> None:
        pass


def _turns(checkpoints: Any, log: _Events, plain: Path, block_steps: int) -> Any:
    """A callback that measures block after block: warm-up, then none, sync, async in turn."""
    import torch.distributed as dist

    from pretrain.checkpoint.rank_file import rank_file_name
    from pretrain.training.callback import Callback

    class Turns(Callback):
        name = "turns"
        modes = ("none", "sync", "async")
        rounds: list[dict[str, float]]
        started = 0.0
        mode: str | None = None

        def on_start(self, trainer: Any) -> None:
            self.rounds = []

        def after_step(self, trainer: Any, record: Any) -> None:
            if record.step % block_steps:
                return
            if self.mode is not None:
                self._end_block(trainer)
            if record.step == trainer.config.train.steps:
                return
            self.mode = self.modes[(record.step // block_steps - 1) % len(self.modes)]
            if self.mode == "none":
                self.rounds.append({})
            os.sync()  # what earlier blocks left to write or delete is not this one's
            dist.barrier()
            self.started = time.perf_counter()
            if self.mode != "none":
                checkpoints.save(trainer, behind=self.mode == "async")

        def _end_block(self, trainer: Any) -> None:
            figures, mode = self.rounds[-1], self.mode
            # An asynchronous save that is not done by now is waited for: its block pays for all of it.
            checkpoints.publish(trainer)
            dist.barrier()
            figures[f"{mode}_s"] = time.perf_counter() - self.started
            if mode == "none":
                return
            figures[f"{mode}_stall_s"] = log.latest["stall_s"]
            figures[f"{mode}_write_s"] = log.latest["write_s"]
            figures["bytes"] = log.latest["bytes"]
            if mode == "async":
                figures["plain_s"] = self._plain_write(Path(log.latest["path"]) / rank_file_name(dist.get_rank()))

        def _plain_write(self, source: Path) -> float:
            # The same bytes, from memory: a disk may treat zeros, as in moments of unseen tokens, in its own way.
            content = memoryview(source.read_bytes())
            os.sync()
            dist.barrier()
            started = time.perf_counter()
            with open(plain, "wb", buffering=0) as stream:
                for done in range(0, len(content), _PIECE):
                    stream.write(content[done : done + _PIECE])
                os.fsync(stream.fileno())
            dist.barrier()
            seconds = time.perf_counter() - started
            plain.unlink()
            return seconds

    return Turns()


def _loads(folder: Path, rounds: int = 5) -> list[dict[str, float]]:
    """Seconds to read all of a checkpoint in three ways; files are in the page cache."""
    from pretrain.checkpoint.reader import CheckpointReader
    from pretrain.parallel.shard import Shard

    def plain() -> None:
        buffer = bytearray(_PIECE)
        for path in folder.glob("*.safetensors"):
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def whole() -> None:
        reader = CheckpointReader(folder)
        for key in reader.manifest.tensors:
            slot, name = key.split(":", 1)
            reader.tensor(name, slot)

    def quarter(rank: int) -> None:
        reader = CheckpointReader(folder)
        for key, entry in reader.manifest.tensors.items():
            slot, name = key.split(":", 1)
            shard = Shard.split(entry.shape, len(entry.shape) - 1, rank, 4)
            reader.read_shard(name, slot, shard, 0, shard.numel)

    records = []
    for _ in range(rounds + 1):
        split_s = max(_seconds(quarter, rank) for rank in range(4))
        records.append({"plain_s": _seconds(plain), "whole_s": _seconds(whole), "split_s": split_s})
    return records[1:]


def _seconds(action: Any, *args: Any) -> float:
    started = time.perf_counter()
    action(*args)
    return time.perf_counter() - started


def _in_fresh_process(function: Any, *args: Any) -> float:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=function, args=(*args, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("a process failed; its error is above")
    value: float = results.get()
    return value


def _peak_memory(mode: str, folder: Path, results: Any) -> None:
    """(Peak during a save - memory before it) / bytes of this rank's shard."""
    import torch

    from pretrain.checkpoint.fragment import Fragment
    from pretrain.checkpoint.rank_file import HostMemory
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.checkpoint.writer import Save
    from pretrain.parallel.shard import Shard

    flat = torch.ones(_MEMORY_SHARD_BYTES // 4)
    parts = flat.chunk(16)
    shape = (parts[0].numel(),)
    fragments = [
        Fragment(f"w{number}", "master", shape, 0, part, Shard.whole(shape)) for number, part in enumerate(parts)
    ]
    before = _status("VmRSS")
    save = Save(
        CheckpointStore(folder / mode),
        step=1,
        attempt=1,
        rank=0,
        gather=lambda value: [value],
        fence=lambda: None,
    )
    if mode == "sync":
        save.write(fragments, {})
    else:
        save.start(fragments, {}, HostMemory())
        save.finish()
    results.put((_status("VmHWM") - before) / _MEMORY_SHARD_BYTES)
    shutil.rmtree(folder / mode)


def _status(field: str) -> int:
    """A size of this process in bytes, from Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: memory is measured on Linux only")


if __name__ == "__main__":
    main()
