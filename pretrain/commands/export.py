"""``pretrain export``: write a checkpoint in Hugging Face's format."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.models.hybrid.config import HybridConfig

_ARCHITECTURES = ("auto", "llama", "mamba", "mamba2", "nemotron_h")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="run directory, one of its checkpoints, or an imported folder"
    )
    parser.add_argument("target", metavar="DIR", type=Path, help="new or empty folder")
    parser.add_argument("--step", help="step of the checkpoint of a run directory (default: the latest)")
    parser.add_argument(
        "--architecture", choices=_ARCHITECTURES, default="auto", help="model_type (default: the first that fits)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to add (default: that of the run's data)")
    parser.add_argument("--shard-mib", type=int, default=4096, help="largest file of weights, in MiB (default: 4096)")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _export(arguments))


@dataclass(frozen=True)
class _Source:
    """What is exported: checkpoint, model, and its tokenizer or why there is none."""

    checkpoint: Path
    model: HybridConfig
    tokenizer: Path | None
    missing: str = ""


def _export(arguments: argparse.Namespace) -> int:
    from pretrain.exchange.architecture import ExchangeError
    from pretrain.exchange.export_model import export_folder

    if arguments.shard_mib < 1:
        raise ExchangeError(f"--shard-mib {arguments.shard_mib}: expected at least 1")
    source = _source(arguments)
    tokenizer = arguments.tokenizer or source.tokenizer
    done = export_folder(
        source.checkpoint,
        source.model,
        arguments.target,
        architecture=arguments.architecture,
        dtype=arguments.dtype,
        tokenizer=tokenizer,
        shard_bytes=arguments.shard_mib << 20,
    )
    print(f"{done.class_name} from {source.checkpoint}")
    for note in done.notes:
        print(f"note: {note}")
    if tokenizer is None:
        print(f"note: no tokenizer ({source.missing}); name one with --tokenizer FILE")
    for path in done.files:
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    return 0


def _source(arguments: argparse.Namespace) -> _Source:
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.locate import checkpoint_folder
    from pretrain.checkpoint.manifest import MANIFEST_NAME, CheckpointError
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.config.check import check
    from pretrain.exchange.imported import imported_model, imported_tokenizer, is_imported

    path: Path = arguments.source
    is_checkpoint = (path / MANIFEST_NAME).is_file()
    if arguments.step is not None and (is_imported(path) or is_checkpoint):
        raise CheckpointError(f"{path} is one checkpoint; --step chooses among those of a run directory")
    for folder in (path, path.resolve().parent):
        if is_imported(folder):
            return _Source(
                checkpoint_folder(folder), imported_model(folder), imported_tokenizer(folder), "none was imported"
            )
    run = RunDir.open(path.resolve().parent.parent if is_checkpoint else path)
    checkpoint = path if is_checkpoint else CheckpointStore(run.checkpoints_path).select(arguments.step)
    if checkpoint is None:
        raise CheckpointError(f"{path} has no checkpoint yet; train it with `pretrain resume {path}`")
    config = check(run.config())
    return _Source(checkpoint, _hybrid(config.model), *_data_tokenizer(config))


def _hybrid(model: object) -> HybridConfig:
    from pretrain.exchange.architecture import ExchangeError
    from pretrain.models.hybrid.config import HybridConfig

    if not isinstance(model, HybridConfig):
        raise ExchangeError(f"a model of {type(model).__name__} cannot be exported, only {HybridConfig.__name__}")
    return model


def _data_tokenizer(config: object) -> tuple[Path | None, str]:
    """The tokenizer of a run's data, or why there is none."""
    from pretrain.config.components import build_component

    try:
        sources = build_component(config.data, seed=config.run.seed)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        return None, f"the run's data cannot be opened: {error}"
    for source in (sources.train, sources.validation):
        if source is not None:
            source.close()
    if sources.tokenizer_path is None:
        return None, "the run's data have none"
    return Path(sources.tokenizer_path), ""
