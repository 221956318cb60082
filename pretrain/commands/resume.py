"""``pretrain resume RUN_DIR``: continue from the frozen configuration and a checkpoint, nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="run directory to continue")
    parser.add_argument("overrides", nargs="*", help="changes of extendable fields: train.steps=600 ...")
    parser.add_argument("--checkpoint", help="checkpoint to continue from: a step or a folder name (default: latest)")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _resume(arguments))


def _resume(arguments: argparse.Namespace) -> int:
    from launchers.exit_codes import ExitCode
    from launchers.lease import Lease
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.damage import describe_damage
    from pretrain.checkpoint.manifest import CorruptCheckpointError
    from pretrain.checkpoint.store import CheckpointStore, verify
    from pretrain.commands.launch import launch_attempt
    from pretrain.commands.report import is_reported
    from pretrain.config.check import check
    from pretrain.config.freeze import Difference, extend
    from pretrain.training.model_check import check_checkpoint_model

    run_dir = RunDir.open(arguments.run_dir)
    # Held before anything is read: a second resume, or a revision added under a running attempt, is refused here.
    with Lease.acquire(run_dir) as lease:
        tree = run_dir.config()
        changes: list[Difference] = []
        if arguments.overrides:
            tree, changes = extend(tree, arguments.overrides)
        config = check(tree)
        store = CheckpointStore(run_dir.checkpoints_path)
        folder = store.select(arguments.checkpoint)
        if folder is None:
            print("The run has no checkpoint yet: starting it from the beginning.")
        else:
            try:
                manifest = verify(folder)
            except CorruptCheckpointError as error:
                raise CorruptCheckpointError(describe_damage(store, folder, [str(error)])) from error
            check_checkpoint_model(config, folder)
            _check_timeline(config, folder)
            # A run that was stopped between its last step and its report goes on with validation and report.
            if manifest.step > config.train.steps or (
                manifest.step == config.train.steps and is_reported(run_dir, config.train.steps)
            ):
                print(
                    f"Nothing to do: {folder.name} has completed {manifest.step} of {config.train.steps} steps. "
                    f"To train on: pretrain resume {arguments.run_dir} train.steps={manifest.step + config.train.steps}"
                )
                return ExitCode.FINISHED
            later = store.set_aside(manifest.step, lease.attempt)
            if later:
                print(f"set aside in checkpoints/set_aside_{lease.attempt:04d}, as of a later step: {', '.join(later)}")
        if changes:
            number = run_dir.add_revision(tree, changes)
            print(f"revision {number}: " + "; ".join(map(str, changes)))
        return launch_attempt(lease, config, folder.name if folder is not None else None)


def _check_timeline(config: Config, folder: Path) -> None:
    """Refuse, before a revision is written, to change what had taken effect in the order of the data."""
    from data_pipeline.loader import check_timeline
    from pretrain.checkpoint.reader import CheckpointReader

    state = CheckpointReader(folder).training["callbacks"].get("data")
    if state and hasattr(config.data, "timeline"):
        check_timeline(config.data.timeline(), state)
