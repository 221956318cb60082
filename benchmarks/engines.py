"""Each engine against the bare library driven by a minimal loop: time of an optimizer step, as a ratio.

    python benchmarks/engines.py [--processes 2] [--rounds 9] [--steps 3]

One engine at a time trains the demo's model (with even numbers of heads and groups, so that tensor parallelism can
split it) on batches in memory. Blocks of steps take turns between ``engine.train_step`` and the same DeepSpeed or
Megatron-Core objects called directly: DeepSpeed's forward, backward and step; Megatron's schedule, gradient
finalisation and optimizer. Both compute the same losses. A ratio is taken within each round; median and quartiles are
reported.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
import warnings
from typing import Any

from results_file import quartiles, write_result

LAYOUTS: dict[str, list[str]] = {
    "deepspeed zero1": ["engine=deepspeed"],
    "deepspeed zero3": ["engine=deepspeed", "engine.zero_stage=3"],
    "deepspeed zero3 offloaded": [
        "engine=deepspeed",
        "engine.zero_stage=3",
        "engine.offload_optimizer=true",
        "engine.offload_parameters=true",
    ],
    "megatron data parallel": ["engine=megatron"],
    "megatron tensor parallel": ["engine=megatron", "engine.tensor_parallel=2", "engine.sequence_parallel=true"],
    "megatron pipeline": ["engine=megatron", "engine.pipeline_parallel=2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps in a block")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    figures: dict[str, Any] = {}
    for layout in LAYOUTS:
        port = random.SystemRandom().randrange(10_000, 30_000)
        results = context.SimpleQueue()
        processes = [
            context.Process(target=_rank, args=(rank, port, layout, vars(arguments), results))
            for rank in range(arguments.processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{layout}: a process failed; its error is above")
        rounds = results.get()
        figures[layout] = {
            "bare_step_s": quartiles([bare for bare, _ in rounds]),
            "ours_step_s": quartiles([ours for _, ours in rounds]),
            "ratio_ours_to_bare": quartiles([ours / bare for bare, ours in rounds]),
        }
        ratio, step = figures[layout]["ratio_ours_to_bare"], figures[layout]["bare_step_s"]
        print(
            f"{layout:<26} bare step {step['median']:.3f} s   ours / bare {ratio['median']:.3f}"
            f"   quartiles {ratio['low']:.3f} .. {ratio['high']:.3f}",
            flush=True,
        )
    write_result("engines", {"arguments": vars(arguments), "figures": figures})


def _rank(rank: int, port: int, layout: str, arguments: dict[str, Any], results: Any) -> None:
    import torch
    import torch.distributed as dist

    from pretrain.config.compose import load_run_config
    from pretrain.engines.build import build_engine
    from pretrain.parallel.process import ProcessEnvironment, join_process_group

    warnings.simplefilter("ignore")
    size = arguments["processes"]
    torch.set_num_threads(1)
    join_process_group(ProcessEnvironment(rank, size, rank, 0, 1, "127.0.0.1", port, 1), torch.device("cpu"))
    _, config = load_run_config(
        [
            "experiment=demo",
            f"data.path={arguments['data']}",
            f"launcher.num_processes={size}",
            "model.mamba2.groups=2",
            "model.mamba2.head_dim=80",
            "model.attention.num_heads=4",
            "model.attention.num_kv_heads=2",
            "train.sample_interval=0",
            *LAYOUTS[layout],
        ]
    )
    engine = build_engine(config, torch.device("cpu"))
    contest = _Contest(engine, config, arguments["steps"])
    rounds = []
    for number in range(arguments["rounds"] + 1):
        # The turns change sides, so that neither always follows the other; the first round is warm-up.
        order = [contest.bare, contest.ours] if number % 2 else [contest.ours, contest.bare]
        times = {turn.__name__: _timed(turn) / arguments["steps"] for turn in order}
        if number:
            rounds.append((times["bare"], times["ours"]))
    if rank == 0:
        results.put(rounds)
    dist.barrier()
    dist.destroy_process_group()


def _timed(turn: Any) -> float:
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    turn()
    dist.barrier()
    return time.perf_counter() - started


class _Contest:
    """Blocks of steps on one engine, through the platform and past it."""

    def __init__(self, engine: Any, config: Any, num_steps: int) -> None:
        from data_pipeline.loader import StepLoader
        from pretrain.training.batches import to_tensors

        self.engine = engine
        self.objective = config.objective.build()
        self.rate = config.optimizer.learning_rate
        train = config.train
        stream = StepLoader(
            config.data.build(seed=config.run.seed).train,
            global_batch=train.global_batch_size,
            micro_batch=train.micro_batch_size,
            dp_rank=engine.dp_rank,
            dp_size=engine.dp_size,
            start_step=0,
        )
        with stream:
            self.steps = [[to_tensors(arrays) for arrays in next(stream)] for _ in range(num_steps)]
        # The same on every rank and close to the truth: the loop's own sum is measured elsewhere.
        self.targets = float(train.global_batch_size * config.data.sequence_length)

    def ours(self) -> None:
        for batches in self.steps:
            self.engine.train_step(batches, self.objective, self.targets, self.rate)

    def bare(self) -> None:
        run = self._bare_deepspeed if hasattr(self.engine, "_engine") else self._bare_megatron
        for batches in self.steps:
            run(batches)

    def _bare_deepspeed(self, batches: list[dict[str, Any]]) -> None:
        engine = self.engine._engine
        for index, batch in enumerate(batches):
            engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            engine.backward(self.objective(engine, batch).loss_sum / self.targets, scale_wrt_gas=False)
            engine.step()

    def _bare_megatron(self, batches: list[dict[str, Any]]) -> None:
        import torch

        from pretrain.engines.megatron_chunk import StageModel, StageOutput

        chunks, optimizer = self.engine._chunks, self.engine._optimizer

        def forward_step(iterator: Any, chunk: Any) -> Any:
            try:
                loss = self.objective(StageModel(chunk, chunk.module, True), next(iterator)).loss_sum
            except StageOutput as output:
                return output.hidden_LBD, None
            return loss / self.targets, lambda scaled: (scaled, torch.zeros((), dtype=torch.int), None)

        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        rows, length = batches[0]["tokens"].shape
        self.engine._schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=chunks[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=False,
        )
        optimizer.step()


if __name__ == "__main__":
    main()
