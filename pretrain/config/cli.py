"""``pretrain config show`` and ``pretrain config check``: look at a configuration without running it."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config.schema import Config

INVALID = 2


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the ``config`` verb."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{show,check}")
    for name, text in (
        ("show", "print the resolved configuration, with all defaults written out"),
        ("check", "check the configuration and report every fault"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("overrides", nargs="*", help="group=option or key.path=value, for example experiment=demo")
        action.add_argument("--config-dir", help="a folder of your own config groups, searched before the shipped one")


def run(args: Namespace) -> int:
    """Run the verb; 0 when the configuration is valid, 2 when it is not."""
    return _show(args) if args.action == "show" else _check(args)


def _show(args: Namespace) -> int:
    import os

    from pretrain.config.check import check, complete_tree
    from pretrain.config.compose import compose_leniently, resolve_paths
    from pretrain.config.freeze import dump
    from pretrain.config.violation import InvalidConfigError

    try:
        composition = compose_leniently(args.overrides, args.config_dir)
    except InvalidConfigError as error:
        print(error, file=sys.stderr)
        return INVALID
    cwd = os.getcwd()
    tree = resolve_paths(composition.tree, cwd)
    try:
        tree = resolve_paths(complete_tree(tree, check(tree, composition.violations)), cwd)
    except InvalidConfigError as error:
        print(dump(tree), end="")
        print(error, file=sys.stderr)
        return INVALID
    print(dump(tree), end="")
    return 0


def _check(args: Namespace) -> int:
    from pretrain.config.compose import load_run_config
    from pretrain.config.violation import InvalidConfigError

    try:
        tree, config = load_run_config(args.overrides, args.config_dir)
    except InvalidConfigError as error:
        print(error, file=sys.stderr)
        return INVALID
    print(_summary(config, {name: tree[name]["_target_"] for name in ("model", "data", "objective")}))
    return 0


def _summary(config: Config, targets: dict[str, str]) -> str:
    train, launcher = config.train, config.launcher
    accumulation = train.global_batch_size // (train.micro_batch_size * launcher.num_processes)
    lines = [
        f"OK: run {config.run.name!r}, seed {config.run.seed}",
        *(f"  {name:<10} {target}" for name, target in targets.items()),
        f"  {'steps':<10} {train.steps} of {train.global_batch_size} sequences"
        f" (processes {launcher.num_processes} x micro-batches {accumulation} x {train.micro_batch_size}),"
        f" {train.precision}",
        f"  {'engine':<10} {config.engine.name}, ZeRO stage {config.engine.zero_stage}",
        f"  {'optimizer':<10} {config.optimizer.name}, peak learning rate {config.optimizer.learning_rate:g},"
        f" {config.optimizer.schedule.kind} after {config.optimizer.schedule.warmup_steps} warm-up steps",
    ]
    return "\n".join(lines)
