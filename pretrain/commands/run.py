"""``pretrain run``: compose once, check everything, freeze the run directory, launch."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="Hydra overrides: experiment=demo train.steps=100 ...")
    parser.add_argument("--config-dir", help="folder with config groups of your own, searched first")
    parser.add_argument("--run-dir", help="folder of the run (default: a new one under run.root)")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from launchers.lease import Lease
    from launchers.run_dir import RunDir
    from pretrain.commands.launch import launch_attempt, shown
    from pretrain.config.check import check
    from pretrain.config.compose import load_run_config
    from pretrain.config.freeze import freeze_components, frozen_for_new_run

    tree, config = load_run_config(arguments.overrides, arguments.config_dir)
    tree = freeze_components(frozen_for_new_run(tree), config)
    config = check(tree)
    is_new = arguments.run_dir is None or not (Path(arguments.run_dir) / "config.yaml").is_file()
    if config.train.init_from is not None and is_new:
        from pretrain.training.initial_weights import check_initial_weights

        check_initial_weights(config)
    run_dir = RunDir.create(tree, root=config.run.root, name=config.run.name, path=arguments.run_dir)
    with Lease.acquire(run_dir) as lease:
        if not run_dir.created:
            print(f"{shown(run_dir.path)} holds this very configuration already: continuing it")
        return launch_attempt(lease, config)
