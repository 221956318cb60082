"""``pretrain verify``: prove on this machine that a run resumes exactly, and that layouts train alike."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.verify.experiment import Experiment

_STEPS = {"resume": 10, "layout": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", required=True, metavar="resume|layout")
    resume = verbs.add_parser("resume", help="run; run, kill and resume; compare every step")
    layout = verbs.add_parser("layout", help="run on several layouts; compare the trajectories")
    for verb, name in ((resume, "resume"), (layout, "layout")):
        verb.add_argument("overrides", nargs="*", help="as of `pretrain run`: experiment=tiny engine.zero_stage=2 ...")
        verb.add_argument("--config-dir", help="folder with config groups of your own, searched first")
        verb.add_argument("--steps", type=int, default=_STEPS[name], help="optimizer steps (default: %(default)s)")
        verb.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs in this new folder")
        verb.add_argument("--tolerance", type=float, help="largest difference of the loss, nats per target")
        verb.add_argument("--grad-tolerance", type=float, help="largest relative difference of the gradient norm")
    resume.add_argument("--kill-at", type=int, metavar="STEP", help="kill once this step is recorded")
    resume.add_argument(
        "--then", nargs="+", action="extend", default=[], metavar="OVERRIDE", help="resume on another layout"
    )
    layout.add_argument(
        "--layouts",
        nargs="+",
        action="extend",
        metavar="'NAME: OVERRIDES'",
        help="the first one is the reference; all of them must run",
    )


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _verify(arguments))


def _verify(arguments: argparse.Namespace) -> int:
    from launchers.exit_codes import ExitCode
    from pretrain.verify.experiment import Experiment
    from pretrain.verify.runs import RunFailedError

    if arguments.steps < 1:
        raise ValueError(f"--steps: found {arguments.steps}, expected at least 1")
    action = _resume if arguments.what == "resume" else _layout
    started = time.perf_counter()
    folder = _make_folder(arguments.keep)
    holds = None
    try:
        experiment = Experiment(
            tuple(arguments.overrides), arguments.config_dir, arguments.tolerance, arguments.grad_tolerance
        )
        holds = action(arguments, experiment, folder)
    except RunFailedError as error:
        print(f"pretrain verify: {error}", file=sys.stderr)
        return ExitCode.INVALID_INPUT if error.code == ExitCode.INVALID_INPUT else ExitCode.FAILED
    finally:
        # Runs that disagree are evidence; runs that agree, or never were, are not.
        empty = not any(folder.iterdir())
        if arguments.keep is None and (holds or empty):
            shutil.rmtree(folder)
        elif not empty:
            print(f"runs and logs: {folder}")
    print(f"total {time.perf_counter() - started:.1f} s")
    return ExitCode.FINISHED if holds else ExitCode.FAILED


def _resume(arguments: argparse.Namespace, experiment: Experiment, folder: Path) -> bool:
    from pretrain.verify.resume import ResumePlan, verify_resume

    then = [word for text in arguments.then for word in shlex.split(text)]
    plan = ResumePlan.make(arguments.steps, arguments.kill_at, then)
    return verify_resume(experiment, plan, folder, _say)


def _layout(arguments: argparse.Namespace, experiment: Experiment, folder: Path) -> bool:
    from pretrain.verify.layout import DEFAULT_LAYOUTS, Layout, verify_layout

    named = [Layout.parse(text) for text in arguments.layouts or ()]
    return verify_layout(experiment, named or DEFAULT_LAYOUTS, arguments.steps, folder, _say, must_run=bool(named))


def _make_folder(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="pretrain-verify-"))
    folder = keep.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--keep: found {folder}, which is not empty; expected a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--keep: {folder} cannot be made ({error.strerror}); choose another folder") from error
    return folder


def _say(line: str) -> None:
    print(line, flush=True)
