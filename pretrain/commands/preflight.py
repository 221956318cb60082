"""``pretrain preflight``: everything that can be checked about a run without a GPU, before it waits in a queue."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.config.check import Judgement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        help="as of `pretrain run`: experiment=demo launcher=slurm ...; or a run directory and what is to change in it",
    )
    parser.add_argument("--config-dir", help="folder with config groups of your own, searched first")
    parser.add_argument("--run-dir", help="folder that the run is to have (default: a new one under run.root)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 when nothing speaks against starting, else 2."""
    from pretrain.training.failure import guarded

    return guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    import json

    from launchers.exit_codes import ExitCode
    from pretrain.config.violation import InvalidConfigError
    from pretrain.planning.preflight.findings import show
    from pretrain.planning.preflight.registry import faults_only, preflight_of_faulty

    try:
        tree, judgement, run_dir = _judged(arguments)
    except InvalidConfigError as error:
        findings = faults_only(error.violations)
    else:
        path = Path(arguments.run_dir).absolute() if arguments.run_dir is not None else None
        findings = preflight_of_faulty(tree, judgement, run_dir, path)
    if arguments.json:
        print(json.dumps(findings.to_json(), indent=1))
    else:
        show(findings)
    return ExitCode.FINISHED if findings.passed else ExitCode.INVALID_INPUT


def _judged(arguments: argparse.Namespace) -> tuple[dict[str, Any], Judgement, RunDir | None]:
    """The tree, as it would be frozen where it is sound, and what the check says of it.

    Raises InvalidConfigError when nothing meaningful can be composed, RunDirectoryError.
    """
    from pretrain.config.check import complete_tree, judge
    from pretrain.config.compose import compose_leniently, resolve_paths
    from pretrain.config.freeze import extend

    first = arguments.overrides[0] if arguments.overrides else ""
    if first and "=" not in first and (os.path.isdir(first) or os.sep in first):
        from launchers.run_dir import RunDir

        run_dir = RunDir.open(first)
        tree = run_dir.config()
        if arguments.overrides[1:]:
            tree, _ = extend(tree, arguments.overrides[1:])
        return tree, judge(tree), run_dir
    cwd = os.getcwd()
    composition = compose_leniently(arguments.overrides, arguments.config_dir)
    tree = resolve_paths(composition.tree, cwd)
    judgement = judge(tree, composition.violations)
    if not judgement.violations:
        tree = resolve_paths(complete_tree(tree, judgement.config), cwd)  # defaults hold relative paths too
        judgement = judge(tree)
    return tree, judgement, None
