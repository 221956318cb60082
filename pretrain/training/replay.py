"""One rank of a replay: ``python -m pretrain.training.replay RUN_DIR --step N --output DIR`` (`pretrain replay`).

Takes the settings from ``replay_config.yaml`` in the output folder, which the command wrote there. Loads the nearest
checkpoint before the step, trains up to it exactly as the run did, and makes the step without its update. The run
directory is read only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.exit_codes import ExitCode

if TYPE_CHECKING:
    from pretrain.config.schema import Config
    from pretrain.engines.base import StepResult
    from pretrain.training.replay_target import ReplayTarget

logger = logging.getLogger("pretrain")

RESULT_NAME = "replay.json"
CONFIG_NAME = "replay_config.yaml"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pretrain.training.replay", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        return _replay(arguments)
    except Exception as error:
        from pretrain.training.failure import exit_code_of

        code = exit_code_of(error)
        if code == ExitCode.FAILED:
            traceback.print_exc()
        logger.error("%s", error)
        return code


def _replay(arguments: argparse.Namespace) -> int:
    import os

    import torch

    from launchers.run_dir import RunDir
    from pretrain.config.check import check
    from pretrain.config.freeze import load
    from pretrain.parallel.megatron_import import prepare_environment
    from pretrain.parallel.process import ProcessEnvironment, join_process_group, select_device
    from pretrain.training.health_records import plain
    from pretrain.training.replay_target import replay_target

    env = ProcessEnvironment.read()
    run = RunDir.open(arguments.run_dir)
    settings = arguments.output / CONFIG_NAME
    config = check(load(settings.read_text(encoding="utf-8"), str(settings)))
    target = replay_target(run, config.train.global_batch_size, arguments.step, arguments.batch)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(config.run.seed)
    if config.engine.name == "megatron":
        prepare_environment()
    device = select_device(config.launcher.device, env.local_rank)
    join_process_group(env, device)
    found = _Replay(config, target, env, device, run.quarantine_path).run()
    if env.rank == 0:
        result = {"run": str(run.path), **found}
        (arguments.output / RESULT_NAME).write_text(json.dumps(plain(result), indent=1, ensure_ascii=False) + "\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return ExitCode.FINISHED


class _Replay:
    """Engine, data and loop of the run, brought to the step."""

    def __init__(self, config: Config, target: ReplayTarget, env: Any, device: Any, quarantine: Path) -> None:
        from pretrain.config.components import build_component
        from pretrain.engines.build import build_engine

        self.config = config
        self.target = target
        self.env = env
        self.sources = build_component(config.data, seed=config.run.seed)
        if hasattr(self.sources.train, "bad_data"):
            # What was substituted stays substituted, also where it has healed since.
            self.sources.train.bad_data.recall(quarantine)
        self.objective = build_component(config.objective)
        self.engine = build_engine(config, device)

    def run(self) -> dict[str, Any]:
        """Everything found, on rank 0; other ranks' result is of no use. Collective."""
        from pretrain.training.inspection import gradient_norms, not_finite, sums_by_name

        state = self._load()
        self._advance(state)
        weights = not_finite(sums_by_name(self.engine.export_state(), with_slot=True))
        step = self._step(state)
        target = self.target
        result = {
            "step": target.step,
            "batch": target.batch,
            "attempt": target.attempt,
            "revision": target.revision,
            "checkpoint": None if target.checkpoint is None else str(target.checkpoint),
            "steps_advanced": target.step - 1 - target.checkpoint_step,
            "skipped": target.skipped,
            "event": None if target.event is None else {k: v for k, v in target.event.items() if k != "samples"},
            "processes": self.env.world_size,
            "engine": self.config.engine.name,
            "learning_rate": step["learning_rate"],
            "targets": step["targets"],
            "loss": step["loss"],
            "grad_norm": step["grad_norm"],
            "recorded_loss": target.loss,
            "recorded_grad_norm": target.grad_norm,
            "reproduced": None if target.loss is None else _same(step["loss"], target.loss),
            "gradients": gradient_norms(step["gradients"]),
            "not_finite": {
                "weights and optimizer state before the step": weights,
                "gradients": not_finite(step["gradients"]),
                "outputs of modules, first to last": step["outputs"],
            },
            "samples": self._samples(step["batches"]),
        }
        self.sources.train.close()
        if self.sources.validation is not None:
            self.sources.validation.close()
        return result

    def _load(self) -> Any:
        from data_pipeline.loader import check_loader_state
        from pretrain.checkpoint.reader import CheckpointReader
        from pretrain.checkpoint.store import CheckpointStore
        from pretrain.training.model_check import check_checkpoint_model
        from pretrain.training.resume import import_together, verify_together
        from pretrain.training.state import TrainState

        target = self.target
        if target.checkpoint is None:
            self._begin()
            state = TrainState()
        else:
            verify_together(CheckpointStore(target.checkpoint.parent), target.checkpoint, self.env)
            reader = CheckpointReader(target.checkpoint)
            check_checkpoint_model(self.config, target.checkpoint)
            import_together(self.engine, reader)
            state = TrainState.from_dict(reader.training)
            if data := reader.training["callbacks"].get("data"):
                check_loader_state(self.sources.train, data)
        state.skipped = list(target.skipped)
        return state

    def _begin(self) -> None:
        """Initial weights, those of ``train.init_from`` where the run began with them."""
        from pretrain.checkpoint.locate import checkpoint_folder
        from pretrain.training.initial_weights import WeightsOnly
        from pretrain.training.resume import import_together

        if self.config.train.init_from is not None:
            folder = checkpoint_folder(Path(self.config.train.init_from))
            import_together(self.engine, WeightsOnly(folder, self.engine.scalar_state()))

    def _stream(self, first: int, skipped: frozenset[int]) -> Any:
        from data_pipeline.loader import StepLoader

        train = self.config.train
        return StepLoader(
            self.sources.train,
            global_batch=train.global_batch_size,
            micro_batch=train.micro_batch_size,
            dp_rank=self.engine.dp_rank,
            dp_size=self.engine.dp_size,
            start_step=first,
            skip=skipped,
        )

    def _advance(self, state: Any) -> None:
        """Train up to the step as the run did."""
        from pretrain.config.launch_schema import HealthConfig
        from pretrain.training.loop import Trainer
        from pretrain.training.signals import StopRequest

        if state.step == self.target.step - 1:
            return
        logger.info("training steps %d..%d again", state.step + 1, self.target.step - 1)
        train = dataclasses.replace(self.config.train, steps=self.target.step - 1)
        Trainer(
            config=dataclasses.replace(self.config, train=train, health=HealthConfig()),
            engine=self.engine,
            objective=self.objective,
            open_stream=self._stream,
            state=state,
            stop=StopRequest(()),
            callbacks=[],
        ).run()

    def _step(self, state: Any) -> dict[str, Any]:
        """The step without its update."""
        from pretrain.optim.schedule import learning_rate
        from pretrain.parallel.process import all_reduce_floats, gather_objects
        from pretrain.training.batches import to_device, to_tensors
        from pretrain.training.inspection import Sums, sums_by_name, watched_outputs
        from pretrain.training.loop import KeyedLoss

        config, engine = self.config, self.engine
        batch = state.next_batch(config.train.global_batch_size)
        assert batch == self.target.batch, f"batch {batch} follows, expected {self.target.batch}"
        with self._stream(batch, frozenset(state.skipped)) as stream:
            host = [to_tensors(arrays) for arrays in next(stream)]
        targets = float(sum(self.objective.denominator(micro) for micro in host)) if engine.is_data_leader else 0.0
        (targets,) = all_reduce_floats([targets])
        rate = learning_rate(config.optimizer.schedule, config.optimizer.learning_rate, state.step)
        gradients: Sums = {}
        outputs: list[str] = []

        def look(result: StepResult) -> bool:
            gradients.update(sums_by_name(engine.gradients(), with_slot=False))
            return False

        with watched_outputs(engine.parts, outputs):
            batches = [to_device(micro, engine.device) for micro in host]
            result = engine.train_step(batches, KeyedLoss(self.objective, config.run.seed), targets, rate, look)
        named: dict[str, None] = {}
        for part in gather_objects(outputs):
            named |= dict.fromkeys(part)
        return {
            "learning_rate": rate,
            "targets": round(targets),
            "loss": all_reduce_floats([result.loss_sum])[0] / targets,
            "grad_norm": result.grad_norm,
            "gradients": gradients,
            "outputs": list(named),
            "batches": host,
        }

    def _samples(self, batches: list[Any]) -> list[dict[str, Any]]:
        """All samples of the batch: id, loss, provenance, text."""
        from data_pipeline.loader import step_rows
        from pretrain.parallel.process import gather_objects
        from pretrain.training.batches import SAMPLE_IDS, to_device, to_tensors
        from pretrain.training.health_callback import provenance, text_decoder
        from pretrain.training.inspection import loss_of_sample

        source, engine = self.sources.train, self.engine
        decode = text_decoder(self.sources.tokenizer_path)
        own = []
        for micro in batches:
            for row, sample_id in enumerate(int(i) for i in micro[SAMPLE_IDS]):
                single = to_tensors(step_rows(source, range(sample_id, sample_id + 1), source.num_samples, False))
                loss_sum, targets = loss_of_sample(engine, self.objective, to_device(single, engine.device))
                sample = {
                    "id": sample_id,
                    "loss": loss_sum / targets if targets else None,
                    "targets": round(targets),
                    "provenance": provenance(source, sample_id),
                }
                if decode is not None and "tokens" in micro:
                    sample["text"] = decode(micro["tokens"][row].tolist())
                own.append(sample)
        gathered = gather_objects(own if engine.is_data_leader else [])
        return sorted((sample for part in gathered for sample in part), key=lambda sample: int(sample["id"]))


def _same(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))


if __name__ == "__main__":
    sys.exit(main())
