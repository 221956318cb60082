"""``pretrain generate``: complete a prompt with a run's checkpoint, in one process and without an engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="run directory, or a folder written by `pretrain import`")
    parser.add_argument("--prompt", default="def ", help="text to continue (default: %(default)r)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=40, help="sample among the k most likely tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="step or folder name (default: latest)")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _generate(arguments))


def _generate(arguments: argparse.Namespace) -> int:
    print(arguments.prompt + _complete(arguments))
    return 0


def _complete(arguments: argparse.Namespace) -> str:
    from pretrain.checkpoint.reader import CheckpointReader, load_weights
    from pretrain.checkpoint.store import verify
    from pretrain.config.components import build_component
    from pretrain.exchange.imported import is_imported
    from pretrain.parallel.layers import TorchLayers
    from pretrain.training.sampling import TextSampler

    path = Path(arguments.run_dir)
    source = _of_import(path, arguments.checkpoint) if is_imported(path) else _of_run(path, arguments.checkpoint)
    verify(source.checkpoint)
    model = build_component(source.model, layers=TorchLayers())
    if not TextSampler.supports(model):
        raise ValueError(
            f"{type(model).__name__} cannot generate: it needs the methods init_cache, prefill and decode "
            "(see pretrain.models.generation.RecurrentLM)"
        )
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise ValueError("the run's data source has no tokenizer, so there is no text to generate")
    load_weights(model, CheckpointReader(source.checkpoint))
    sampler = TextSampler(tokenizer, temperature=arguments.temperature, top_k=arguments.top_k)
    return sampler.complete(model, arguments.prompt, arguments.tokens, seed=arguments.seed)


@dataclass(frozen=True)
class _Source:
    """A checkpoint, the model that it holds, and where its tokenizer is found (asked once the model is built)."""

    checkpoint: Path
    model: Any
    tokenizer: Callable[[], str | Path | None]


def _of_run(path: Path, choice: str | None) -> _Source:
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.manifest import CheckpointError
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.config.check import check
    from pretrain.config.components import build_component

    run_dir = RunDir.open(path)
    config = check(run_dir.config())
    folder = CheckpointStore(run_dir.checkpoints_path).select(choice)
    if folder is None:
        raise CheckpointError(f"{run_dir.path} has no checkpoint yet; train it with `pretrain resume`")
    return _Source(folder, config.model, lambda: build_component(config.data, seed=config.run.seed).tokenizer_path)


def _of_import(path: Path, choice: str | None) -> _Source:
    from pretrain.checkpoint.locate import checkpoint_folder
    from pretrain.checkpoint.manifest import CheckpointError
    from pretrain.exchange.imported import imported_model, imported_tokenizer

    if choice is not None:
        raise CheckpointError(f"{path} is one checkpoint; --checkpoint chooses among those of a run directory")
    return _Source(checkpoint_folder(path), imported_model(path), lambda: imported_tokenizer(path))
