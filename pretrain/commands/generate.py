"""``pretrain generate``: complete a prompt with a run's checkpoint, in one process and without an engine."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="run directory")
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
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.manifest import CheckpointError
    from pretrain.checkpoint.reader import CheckpointReader, load_weights
    from pretrain.checkpoint.store import CheckpointStore, verify
    from pretrain.config.check import check
    from pretrain.config.components import build_component
    from pretrain.parallel.layers import TorchLayers
    from pretrain.training.sampling import TextSampler

    run_dir = RunDir.open(arguments.run_dir)
    config = check(run_dir.config())
    folder = CheckpointStore(run_dir.checkpoints_path).select(arguments.checkpoint)
    if folder is None:
        raise CheckpointError(f"{run_dir.path} has no checkpoint yet; train it with `pretrain resume`")
    verify(folder)
    model = build_component(config.model, layers=TorchLayers())
    if not TextSampler.supports(model):
        raise ValueError(
            f"{type(model).__name__} cannot generate: it needs the methods init_cache, prefill and decode "
            "(see pretrain.models.generation.RecurrentLM)"
        )
    tokenizer = build_component(config.data, seed=config.run.seed).tokenizer_path
    if tokenizer is None:
        raise ValueError("the run's data source has no tokenizer, so there is no text to generate")
    load_weights(model, CheckpointReader(folder))
    sampler = TextSampler(tokenizer, temperature=arguments.temperature, top_k=arguments.top_k)
    return sampler.complete(model, arguments.prompt, arguments.tokens, seed=arguments.seed)
