"""``pretrain data verify``: re-hash everything and report every fault."""

from __future__ import annotations

import argparse

_EXIT_DAMAGED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``verify`` to ``parser``."""
    parser.add_argument("path", help="dataset folder or URL")
    parser.add_argument("--workers", type=int, help="processes (default: usable cores)")


def run(args: argparse.Namespace) -> int:
    """Print one line per fault; returns the exit code (2 when there is any)."""
    from data_pipeline.commands.progress import show_progress
    from data_pipeline.store.manifest import Manifest
    from data_pipeline.store.verify import find_damage
    from data_pipeline.wording import counted

    manifest = Manifest.load(args.path)
    with show_progress() as progress:
        faults = find_damage(manifest, workers=args.workers, progress=progress)
    for fault in faults:
        print(fault)
    checked = f"{counted(len(manifest.shard_table()), 'shard')} checked"
    print(f"{checked}: {counted(len(faults), 'fault') if faults else 'all sound'}")
    return _EXIT_DAMAGED if faults else 0
