"""``pretrain checkpoint list|inspect|verify|convert``: what checkpoints hold, whether they are whole, other forms."""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.checkpoint.manifest import FragmentEntry, Manifest
    from pretrain.checkpoint.store import CheckpointStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,inspect,verify,convert}")

    listing = actions.add_parser("list", help="one line for each checkpoint of a run")
    listing.add_argument("path", metavar="RUN_DIR", type=Path)

    inspect = actions.add_parser("inspect", help="what one checkpoint holds")
    _add_source(inspect, "path")
    inspect.add_argument(
        "--tensors", action="store_true", help="also every tensor: shape, dtype and where its pieces are"
    )

    verify = actions.add_parser("verify", help="hash every file and name all damage")
    _add_source(verify, "path", "step of the one to verify (default: all)")

    convert = actions.add_parser("convert", help="rewrite a checkpoint with whole tensors, or export its weights")
    _add_source(convert, "source")
    convert.add_argument("target", metavar="DST", type=Path, help="new or empty folder")
    convert.add_argument("--version", type=int, help="format version to write (default: the newest)")
    convert.add_argument("--weights-only", action="store_true", help="plain safetensors of weights by name")
    convert.add_argument("--dtype", choices=("bf16", "fp32"), help="of exported weights (default: as stored)")
    convert.add_argument("--files", type=int, default=1, help="number of files to spread the tensors over (default: 1)")


def _add_source(parser: argparse.ArgumentParser, name: str, step: str = "step (default: the latest)") -> None:
    parser.add_argument(name, metavar="RUN_OR_CHECKPOINT_DIR", type=Path)
    parser.add_argument("--step", help=step)


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    actions = {"list": _list, "inspect": _inspect, "verify": _verify, "convert": _convert}
    return guarded(lambda: actions[arguments.action](arguments))


def _is_checkpoint(path: Path) -> bool:
    from pretrain.checkpoint.manifest import MANIFEST_NAME
    from pretrain.checkpoint.store import checkpoint_step

    # By its name too, so that a folder without manifest is called damaged and not unknown.
    return (path / MANIFEST_NAME).is_file() or (path.is_dir() and checkpoint_step(path.resolve().name) is not None)


def _store(path: Path) -> CheckpointStore:
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.store import CheckpointStore

    return CheckpointStore(RunDir.open(path).checkpoints_path)


def _folder(path: Path, step: str | None) -> Path:
    """The checkpoint that the user means: the folder itself, or one of a run's."""
    from pretrain.checkpoint.manifest import CheckpointError

    if _is_checkpoint(path):
        if step is not None:
            raise CheckpointError(f"{path} is one checkpoint; --step chooses among those of a run directory")
        return path
    folder = _store(path).select(step)
    if folder is None:
        raise CheckpointError(f"{path} has no checkpoint yet; train it with `pretrain resume {path}`")
    return folder


def _list(arguments: argparse.Namespace) -> int:
    return _show(arguments.path, None, hash_files=False)


def _verify(arguments: argparse.Namespace) -> int:
    if _is_checkpoint(arguments.path) or arguments.step is not None:
        return _show(arguments.path, [_folder(arguments.path, arguments.step)], hash_files=True)
    return _show(arguments.path, None, hash_files=True)


def _show(path: Path, folders: list[Path] | None, *, hash_files: bool) -> int:
    """One line for each of ``folders`` (None: all of the run at ``path``)."""
    from launchers.exit_codes import ExitCode
    from pretrain.checkpoint.manifest import CorruptCheckpointError, Manifest
    from pretrain.checkpoint.store import verify

    latest, scores = None, {}
    if folders is None:
        store = _store(path)
        folders = [store.path(step) for step in store.steps()]
        latest, scores = store.latest(), store.scores()
        if not folders:
            print("no checkpoints")
    damaged = False
    for folder in folders:
        try:
            manifest = verify(folder) if hash_files else Manifest.load(folder)
        except CorruptCheckpointError as error:
            damaged = True
            print(f"{folder.name}  DAMAGED  {error}")
            continue
        score = f"  validation loss {scores[manifest.step]:.4f}" if manifest.step in scores else ""
        print(
            f"{folder.name}  {'intact  ' if hash_files else ''}{_size(manifest):9.1f} MiB  "
            f"{len(manifest.files)} files  {len(manifest.tensors)} tensors  "
            f"written by {manifest.training.get('world_size')} processes{score}"
            f"{'  (latest)' if folder == latest else ''}"
        )
    return ExitCode.CORRUPTED_CHECKPOINT if damaged else ExitCode.FINISHED


def _size(manifest: Manifest) -> float:
    """MiB of all files."""
    return float(sum(file["bytes"] for file in manifest.files.values())) / 2**20


def _inspect(arguments: argparse.Namespace) -> int:
    from pretrain.checkpoint.manifest import Manifest

    folder = _folder(arguments.path, arguments.step)
    manifest = Manifest.load(folder)
    print(f"{folder.name}  format version {manifest.version}, {_size(manifest):.1f} MiB in {len(manifest.files)} files")
    for name, value in manifest.training.items():
        if name not in ("step", "callbacks"):
            print(f"  {name:<18} {value}")
    slots: dict[str, list[str]] = {}
    for key in manifest.tensors:
        slots.setdefault(key.split(":", 1)[0], []).append(key)
    print(f"  {'slot':<12} {'tensors':>8} {'elements':>15} {'pieces':>8}  dtypes")
    for slot, keys in slots.items():
        entries = [manifest.tensors[key] for key in keys]
        elements = sum(prod(entry.shape) for entry in entries)
        pieces = sum(len(entry.fragments) for entry in entries)
        dtypes = " ".join(sorted({entry.dtype for entry in entries}))
        print(f"  {slot:<12} {len(keys):>8} {elements:>15,} {pieces:>8}  {dtypes}")
    if arguments.tensors:
        for key, entry in manifest.tensors.items():
            pieces_text = ", ".join(map(_piece, entry.fragments))
            print(f"{key}  {list(entry.shape)}  {entry.dtype}  {pieces_text}")
    return 0


def _piece(fragment: FragmentEntry) -> str:
    text = f"{fragment.file}[{fragment.start}:{fragment.stop}]"
    if fragment.shard:
        text += f" of columns {fragment.shard.start}:{fragment.shard.stop} of {fragment.shard.row_length}"
    return text


def _convert(arguments: argparse.Namespace) -> int:
    from pretrain.checkpoint.manifest import READABLE, VERSION, CheckpointError

    faults = []
    if arguments.version is not None and arguments.version not in READABLE:
        faults.append(f"--version {arguments.version}: this release writes {' and '.join(map(str, READABLE))}")
    if arguments.version is not None and arguments.weights_only:
        faults.append("--version does not go with --weights-only, whose files are plain safetensors")
    if arguments.dtype and not arguments.weights_only:
        faults.append("--dtype needs --weights-only: a checkpoint to train from keeps its FP32 masters")
    if faults:
        raise CheckpointError("\n".join(faults))
    from pretrain.checkpoint.convert import convert_checkpoint, export_weights

    source = _folder(arguments.source, arguments.step)
    if arguments.weights_only:
        written = export_weights(source, arguments.target, dtype=arguments.dtype, num_files=arguments.files)
    else:
        version = arguments.version or VERSION
        written = convert_checkpoint(source, arguments.target, version=version, num_files=arguments.files)
    for path in written:
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    return 0
