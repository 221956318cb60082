"""Our training loop against a bare loop over the bare DeepSpeed engine: tokens/s, as a ratio.

    python benchmarks/trainer_overhead.py [--data data/stdlib] [--processes 2] [--rounds 12] [--steps 10]

Both train the demo's model with the same thread count. The bare loop holds its batches in memory, takes a constant
learning rate and records nothing. Ours reads the data set, normalises by the global number of target tokens, follows
the schedule, checks for stop requests and non-finite numbers, writes ``metrics.jsonl`` and sends it to MLflow (SQLite);
each block of ours ends with a synchronous flush to MLflow, which in a run happens in a background thread every ten
seconds: about the ten steps of a block. Up to two steps of data are ready before a block starts. Blocks take turns; a
ratio is taken within each round, and the median and quartiles are reported. Checkpoints, validation and start-up are
not part of it: every run reports their times.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from results_file import quartiles, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps in a block")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, port, Path(folder), vars(arguments), results))
            for rank in range(arguments.processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a process failed; its error is above")
    rounds = results.get()
    ratio = quartiles([ours / bare for bare, ours in rounds])
    figures = {
        "bare_tokens_per_s": quartiles([bare for bare, _ in rounds]),
        "ours_tokens_per_s": quartiles([ours for _, ours in rounds]),
        "ratio_ours_to_bare": ratio,
    }
    for name, values in figures.items():
        print(f"{name:<22} median {values['median']:>10.4g}   quartiles {values['low']:.4g} .. {values['high']:.4g}")
    print(f"goal: ratio of at least 0.97: {'reached' if ratio['median'] >= 0.97 else 'NOT reached'}")
    write_result("trainer_overhead", {"arguments": vars(arguments), "figures": figures, "rounds": rounds})


def _rank(rank: int, port: int, folder: Path, arguments: dict[str, Any], results: Any) -> None:
    import torch
    import torch.distributed as dist

    from pretrain.config.check import check
    from pretrain.config.compose import load_run_config
    from pretrain.config.freeze import dump, frozen_for_new_run
    from pretrain.parallel.process import ProcessEnvironment, join_process_group

    size = arguments["processes"]
    torch.set_num_threads(1)
    join_process_group(ProcessEnvironment(rank, size, rank, 0, 1, "127.0.0.1", port, 1), torch.device("cpu"))
    steps = arguments["steps"] * (arguments["rounds"] + 1)
    tree, _ = load_run_config(
        [
            "experiment=demo",
            f"data.path={arguments['data']}",
            f"launcher.num_processes={size}",
            f"train.steps={steps}",
            "optimizer.schedule.warmup_steps=0",
            f"tracking.store={folder / 'mlruns'}",
        ]
    )
    tree = frozen_for_new_run(tree)
    config = check(tree)
    if rank == 0:
        (folder / "config.yaml").write_text(dump(tree))
    dist.barrier()
    comparison = _Comparison(config, folder, rank, size, arguments["steps"])
    comparison.trainer().run()
    if rank == 0:
        results.put(comparison.rounds)
    dist.barrier()
    dist.destroy_process_group()


class _Comparison:
    """Both contenders in one process; after each block of ours the bare loop gets its turn."""

    def __init__(self, config: Any, folder: Path, rank: int, size: int, block_steps: int) -> None:
        self.config, self.folder, self.rank, self.size = config, folder, rank, size
        self.block_steps = block_steps
        self.rounds: list[tuple[float, float]] = []
        self.sources = config.data.build(seed=config.run.seed)
        self.objective = config.objective.build()
        self.bare = self._bare_engine()
        self.batches = self._batches_in_memory()

    def _model(self) -> Any:
        from pretrain.parallel.layers import TorchLayers

        model = self.config.model.build(layers=TorchLayers())
        model.reset_parameters(self.config.run.seed)
        return model

    def _bare_engine(self) -> Any:
        from pretrain.engines.deepspeed_import import import_deepspeed
        from pretrain.engines.deepspeed_settings import deepspeed_settings
        from pretrain.optim.build import build_optimizer

        deepspeed = import_deepspeed("cpu")
        deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        model = self._model()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, self.config.optimizer),
            config=deepspeed_settings(self.config),
            dist_init_required=False,
        )
        return engine

    def _batches_in_memory(self) -> list[list[dict[str, Any]]]:
        from pretrain.training.batches import to_tensors

        with self._stream(0) as stream:
            return [[to_tensors(batch) for batch in next(stream)] for _ in range(self.block_steps)]

    def _stream(self, first_step: int) -> Any:
        from data_pipeline.loader import StepLoader

        train = self.config.train
        return StepLoader(
            self.sources.train,
            global_batch=train.global_batch_size,
            micro_batch=train.micro_batch_size,
            dp_rank=self.rank,
            dp_size=self.size,
            start_step=first_step,
        )

    def bare_block(self) -> float:
        """Global tokens per second of one block of the bare loop."""
        import torch.distributed as dist

        tokens = 0.0
        dist.barrier()
        started = time.perf_counter()
        for step in self.batches:
            for batch in step:
                targets = self.objective.denominator(batch)
                self.bare.backward(self.objective(self.bare, batch).loss_sum / targets)
                self.bare.step()
                tokens += targets
        dist.barrier()
        return self._global(tokens) / (time.perf_counter() - started)

    def _global(self, value: float) -> float:
        from pretrain.parallel.process import all_reduce_floats

        return all_reduce_floats([value])[0]

    def trainer(self) -> Any:
        from pretrain.engines.deepspeed import DeepSpeedEngine
        from pretrain.tracking.metrics_log import MetricsLog
        from pretrain.tracking.store import resolve_uri
        from pretrain.tracking.uploader import RunUploader
        from pretrain.training.callback import Callback
        from pretrain.training.callbacks import MetricsCallback, NullLog
        from pretrain.training.loop import Trainer
        from pretrain.training.signals import StopRequest
        from pretrain.training.state import TrainState

        log: Any = MetricsLog(self.folder / "metrics.jsonl", 1) if self.rank == 0 else NullLog()
        uploader = None
        if self.rank == 0:
            uploader = RunUploader(self.folder, resolve_uri(self.config.tracking), self.config.tracking.experiment)
            uploader.remember("benchmark", {}, [])
            uploader.flush()
        comparison = self

        class Turns(Callback):
            """Ends each block of ours: flush, measure, give the bare loop its turn. The first round is warm-up."""

            name = "turns"
            started = 0.0
            tokens = 0

            def on_start(self, trainer: Any) -> None:
                self.started = time.perf_counter()

            def after_step(self, trainer: Any, record: Any) -> None:
                import torch.distributed as dist

                self.tokens += record.tokens
                if record.step % comparison.block_steps:
                    return
                if uploader is not None:
                    uploader.flush()
                dist.barrier()
                ours = self.tokens / (time.perf_counter() - self.started)
                bare = comparison.bare_block()
                if record.step > comparison.block_steps:
                    comparison.rounds.append((bare, ours))
                self.tokens = 0
                dist.barrier()
                self.started = time.perf_counter()

        return Trainer(
            config=self.config,
            engine=DeepSpeedEngine(self._model(), self.config, self.bare.device),
            objective=self.objective,
            open_stream=lambda first, skipped: self._stream(first),
            state=TrainState(),
            stop=StopRequest(),
            callbacks=[MetricsCallback(log), Turns()],
        )


if __name__ == "__main__":
    main()
