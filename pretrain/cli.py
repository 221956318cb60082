"""The ``pretrain`` command: a table of verbs, each imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NamedTuple


class Verb(NamedTuple):
    """The module that offers ``add_arguments(parser)`` and ``run(arguments) -> exit code``, and one line of help."""

    module: str
    help: str


VERBS = {
    "run": Verb("pretrain.commands.run", "start a new run: compose, check, freeze, launch"),
    "preflight": Verb("pretrain.commands.preflight", "check a run before it starts: data, disk, memory, time, cluster"),
    "resume": Verb("pretrain.commands.resume", "continue a run from its frozen configuration and last checkpoint"),
    "runs": Verb("pretrain.commands.runs", "list runs: state, step, loss, speed, time to go, restarts"),
    "status": Verb("pretrain.commands.status", "show one run: state, attempts, ranks, checkpoints, what to do next"),
    "logs": Verb("pretrain.commands.logs", "print or follow a run's logs, over restarts"),
    "cancel": Verb("pretrain.commands.cancel", "save and stop a run, or take it out of the queue"),
    "data": Verb("data_pipeline.cli", "prepare, inspect and verify data sets"),
    "config": Verb("pretrain.commands.config", "show or check a configuration without running it"),
    "offload": Verb("pretrain.commands.offload", "plan the offload of optimizer state; measure rates; CPU kernel"),
    "model": Verb("pretrain.commands.model", "describe a model: layers, parameters, FLOPs and memory"),
    "generate": Verb("pretrain.commands.generate", "complete a prompt with a checkpoint of a run"),
    "import": Verb("pretrain.commands.import_", "take over a model in Hugging Face's format"),
    "export": Verb("pretrain.commands.export", "write a checkpoint in Hugging Face's format"),
    "eval": Verb("pretrain.commands.eval", "run tasks of lm-evaluation-harness on a checkpoint"),
    "checkpoint": Verb("pretrain.commands.checkpoint", "list, inspect, verify or convert checkpoints"),
    "verify": Verb("pretrain.commands.verify", "prove that a run resumes exactly, or that layouts train alike"),
    "replay": Verb("pretrain.commands.replay", "run one step of a run again and look into it: samples, gradients"),
    "report": Verb("pretrain.commands.report", "print the summary of a finished run"),
    "ui": Verb("pretrain.tracking.ui", "open the MLflow UI on the tracking store"),
    "tracking": Verb("pretrain.commands.tracking", "send a run's records to MLflow, or show what is not there yet"),
    "doctor": Verb("pretrain.doctor", "report what this machine offers and what is missing for what"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the process's exit code (:mod:`launchers.exit_codes`)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        print(f"pretrain: unknown verb {name!r}\n\n{_overview()}", file=sys.stderr)
        return 2
    module = importlib.import_module(VERBS[name].module)
    parser = argparse.ArgumentParser(prog=f"pretrain {name}", description=VERBS[name].help)
    module.add_arguments(parser)
    arguments, left_over = parser.parse_known_args(rest)
    # argparse takes one uninterrupted group of positional arguments; overrides may stand around options.
    if left_over and not (hasattr(arguments, "overrides") and all(word[0] != "-" for word in left_over)):
        parser.error(f"unrecognized arguments: {' '.join(left_over)}")
    if left_over:
        arguments.overrides = [*arguments.overrides, *left_over]
    try:
        return int(module.run(arguments))
    except KeyboardInterrupt:
        print("pretrain: interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "usage: pretrain VERB ...\n\n" + "\n".join(lines) + "\n\n`pretrain VERB --help` describes a verb."


if __name__ == "__main__":
    sys.exit(main())
