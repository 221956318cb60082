"""``pretrain checkpoint``: list and verify the checkpoints of a run."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="run directory")
    parser.add_argument("--verify", action="store_true", help="hash every file and report all damage")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _list(arguments))


def _list(arguments: argparse.Namespace) -> int:
    from launchers.exit_codes import ExitCode
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.manifest import CorruptCheckpointError, Manifest
    from pretrain.checkpoint.store import CheckpointStore, verify

    store = CheckpointStore(RunDir.open(arguments.run_dir).checkpoints_path)
    damaged = False
    latest = store.latest()
    for step in store.steps():
        folder = store.path(step)
        try:
            manifest = verify(folder) if arguments.verify else Manifest.load(folder)
        except CorruptCheckpointError as error:
            damaged = True
            print(f"{folder.name}  DAMAGED  {error}")
            continue
        size = sum(file["bytes"] for file in manifest.files.values())
        state = "intact  " if arguments.verify else ""
        marks = "  (latest)" if folder == latest else ""
        print(
            f"{folder.name}  {state}{size / 2**20:9.1f} MiB  {len(manifest.files)} files  "
            f"{len(manifest.tensors)} tensors  written by {manifest.training.get('world_size')} processes{marks}"
        )
    if latest is None:
        print("no checkpoints")
    return ExitCode.CORRUPTED_CHECKPOINT if damaged else ExitCode.FINISHED
