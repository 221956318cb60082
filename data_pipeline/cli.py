"""The verb ``pretrain data``: a table of verbs. Nothing heavy is imported until one of them runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

_EXIT_FAILED, _EXIT_INVALID = 1, 2

VERBS = {
    "index": "make sidecars and a manifest for shards that another program wrote",
    "verify": "re-hash every shard and report all damage",
    "inspect": "show what a dataset holds",
    "plan": "pack a text dataset on paper: rows, fill, memory, epochs",
}
"""Verbs of ``data_pipeline.commands.<verb>``, which offers ``add_arguments(parser)`` and ``run(args) -> exit code``."""

PREPARE_MODULES = ("prepare_text", "prepare_media")
"""Modules of ``data_pipeline.commands`` that offer ``add_kinds(subparsers)`` and ``run(args) -> exit code``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of ``pretrain data`` to ``parser``."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    prepare = verbs.add_parser("prepare", help="turn files into a dataset")
    kinds = prepare.add_subparsers(dest="data_kind", required=True, metavar="KIND")
    for name in PREPARE_MODULES:
        if find_spec(f"data_pipeline.commands.{name}") is None:
            continue
        before = set(kinds.choices)
        module = _command(name)
        module.add_kinds(kinds)
        for kind in set(kinds.choices) - before:
            kinds.choices[kind].set_defaults(data_run=module.run)
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, help=text)
        module = _command(name)
        module.add_arguments(verb)
        verb.set_defaults(data_run=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen verb; returns the exit code (0 done, 2 invalid input or damaged data, 1 other
    failure)."""
    try:
        return int(args.data_run(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_INVALID
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_FAILED


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"data_pipeline.commands.{name}")
