"""``pretrain resume RUN_DIR``: continue from the frozen configuration and a checkpoint, nothing else."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.config.freeze import Difference
    from pretrain.config.schema import Config
    from pretrain.planning.preflight.findings import Findings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="run directory to continue")
    parser.add_argument("overrides", nargs="*", help="changes of extendable fields: train.steps=600 launcher=slurm ...")
    parser.add_argument("--checkpoint", help="checkpoint to continue from: a step or a folder name (default: latest)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, show the plan and the batch script; write and start nothing"
    )
    parser.add_argument("--force", action="store_true", help="start in spite of errors that preflight finds")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _resume(arguments))


def _resume(arguments: argparse.Namespace) -> int:
    from launchers.exit_codes import ExitCode
    from launchers.lease import Lease
    from launchers.run_dir import RunDir
    from launchers.slurm.submit import busy_lock, refuse_if_queued
    from pretrain.commands.launch import launch_attempt
    from pretrain.commands.submission import check_submittable, show_plan, submit_run
    from pretrain.config.launch_schema import SlurmConfig

    run_dir = RunDir.open(arguments.run_dir)
    config = _plan(run_dir, arguments).config
    if arguments.dry_run:
        from pretrain.planning.preflight.findings import show

        show_plan(config, run_dir.path, "resume")
        print()
        findings = _preflight(run_dir, arguments)
        show(findings)
        return ExitCode.FINISHED if findings.passed else ExitCode.INVALID_INPUT
    if isinstance(config.launcher, SlurmConfig):
        check_submittable(config, run_dir.path)
        # The job takes an attempt of its own; until it is queued the lock keeps a second resume away.
        with busy_lock(run_dir) as next_attempt:
            plan = _prepare(run_dir, arguments, next_attempt)
            if plan is None:
                return ExitCode.FINISHED
            return submit_run(run_dir, plan.config, "resume")
    refuse_if_queued(run_dir)
    # Held before anything is read: a second resume, or a revision added under a running attempt, is refused here.
    with Lease.acquire(run_dir) as lease:
        plan = _prepare(run_dir, arguments, lease.attempt)
        if plan is None:
            return ExitCode.FINISHED
        return launch_attempt(lease, plan.config, plan.checkpoint)


@dataclass(frozen=True)
class _Plan:
    """What is to be continued, with what changes, from which checkpoint (None: from the beginning)."""

    tree: dict[str, Any]
    config: Config
    changes: list[Difference]
    checkpoint: str | None = None


def _plan(run_dir: RunDir, arguments: argparse.Namespace) -> _Plan:
    from pretrain.config.check import check
    from pretrain.config.freeze import extend

    tree = run_dir.config()
    changes: list[Difference] = []
    if arguments.overrides:
        tree, changes = extend(tree, arguments.overrides)
    return _Plan(tree, check(tree), changes)


def _preflight(run_dir: RunDir, arguments: argparse.Namespace) -> Findings:
    from pretrain.planning.preflight.registry import preflight

    plan = _plan(run_dir, arguments)
    return preflight(plan.tree, plan.config, run_dir)


def _prepare(run_dir: RunDir, arguments: argparse.Namespace, attempt: int) -> _Plan | None:
    """Check the checkpoint, set later ones aside, freeze the changes; None when there is nothing left to do.

    The run must be held by the caller. Raises ValueError, CorruptCheckpointError.
    """
    from pretrain.checkpoint.damage import describe_damage
    from pretrain.checkpoint.manifest import CorruptCheckpointError
    from pretrain.checkpoint.store import CheckpointStore, verify
    from pretrain.commands.report import is_reported
    from pretrain.planning.preflight.findings import stop_on_errors
    from pretrain.training.model_check import check_checkpoint_model

    plan = _plan(run_dir, arguments)
    config, steps = plan.config, plan.config.train.steps
    store = CheckpointStore(run_dir.checkpoints_path)
    folder = store.select(arguments.checkpoint)
    later: list[str] = []
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
        if manifest.step > steps or (manifest.step == steps and is_reported(run_dir, steps)):
            print(
                f"Nothing to do: {folder.name} has completed {manifest.step} of {steps} steps. "
                f"To train on: pretrain resume {arguments.run_dir} train.steps={manifest.step + steps}"
            )
            return None
    stop_on_errors(_preflight(run_dir, arguments), arguments.force)
    if folder is not None:
        later = store.set_aside(manifest.step, attempt)
    if later:
        print(f"set aside in checkpoints/set_aside_{attempt:04d}, as of a later step: {', '.join(later)}")
    if plan.changes:
        number = run_dir.add_revision(plan.tree, plan.changes)
        print(f"revision {number}: " + "; ".join(map(str, plan.changes)))
    return replace(plan, checkpoint=folder.name if folder is not None else None)


def _check_timeline(config: Config, folder: Path) -> None:
    """Refuse, before a revision is written, to change what had taken effect in the order of the data."""
    from data_pipeline.loader import check_timeline
    from pretrain.checkpoint.reader import CheckpointReader

    state = CheckpointReader(folder).training["callbacks"].get("data")
    if state and hasattr(config.data, "timeline"):
        check_timeline(config.data.timeline(), state)
