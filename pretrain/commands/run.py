"""``pretrain run``: compose once, check everything, freeze the run directory, launch or submit."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides: experiment=demo train.steps=100 launcher=slurm ..."
    )
    parser.add_argument("--config-dir", help="folder with config groups of your own, searched first")
    parser.add_argument("--run-dir", help="folder of the run (default: a new one under run.root)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, show the plan and the batch script; write and start nothing"
    )
    parser.add_argument("--force", action="store_true", help="start in spite of errors that preflight finds")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from launchers.exit_codes import ExitCode
    from launchers.lease import Lease
    from launchers.run_dir import RunDir
    from launchers.slurm.submit import refuse_if_queued
    from pretrain.commands.launch import launch_attempt, shown
    from pretrain.commands.submission import check_submittable, planned_path, show_plan, submit_run
    from pretrain.config.check import check
    from pretrain.config.compose import load_run_config
    from pretrain.config.freeze import freeze_components, frozen_for_new_run
    from pretrain.config.launch_schema import SlurmConfig
    from pretrain.planning.preflight.findings import show, stop_on_errors
    from pretrain.planning.preflight.registry import preflight

    tree, config = load_run_config(arguments.overrides, arguments.config_dir)
    path = planned_path(config, arguments.run_dir)
    is_new = not (path / "config.yaml").is_file()
    on_slurm = isinstance(config.launcher, SlurmConfig)
    if on_slurm and not arguments.dry_run:
        check_submittable(config, path)  # first: without Slurm, preflight's findings on the cluster say less
    findings = preflight(tree, config, None if is_new else RunDir.open(path), path=path)
    if arguments.dry_run:
        show_plan(config, path)
        print()
        show(findings)
        return ExitCode.FINISHED if findings.passed else ExitCode.INVALID_INPUT
    stop_on_errors(findings, arguments.force)
    tree = freeze_components(frozen_for_new_run(tree), config)
    config = check(tree)
    if config.train.init_from is not None and is_new:
        from pretrain.training.initial_weights import check_initial_weights

        check_initial_weights(config)
    run_dir = RunDir.create(tree, root=config.run.root, name=config.run.name, path=arguments.run_dir)
    if not run_dir.created:
        print(f"{shown(run_dir.path)} holds this very configuration already: continuing it")
    if on_slurm:
        return submit_run(run_dir, config, "first" if run_dir.created else "resume")
    if not run_dir.created:
        refuse_if_queued(run_dir)
    with Lease.acquire(run_dir) as lease:
        return launch_attempt(lease, config)
