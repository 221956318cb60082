"""``pretrain config show`` and ``pretrain config check``: look at a configuration without running it."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config.schema import Config, EngineConfig, OptimizerChoice

INVALID = 2


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the ``config`` verb."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{show,check}")
    for name, text in (
        ("show", "print the resolved configuration, with all defaults written out"),
        ("check", "check the configuration and report every fault"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("overrides", nargs="*", help="group=option or key.path=value, for example experiment=demo")
        action.add_argument("--config-dir", help="a folder of your own config groups, searched before the shipped one")
        if name == "show":
            action.add_argument("--engine", action="store_true", help="print the engine's own final settings instead")


def run(args: Namespace) -> int:
    """Run the verb; 0 when the configuration is valid, 2 when it is not."""
    return _show(args) if args.action == "show" else _check(args)


def _show(args: Namespace) -> int:
    import os

    from pretrain.config.check import check, complete_tree
    from pretrain.config.compose import compose_leniently, resolve_paths
    from pretrain.config.freeze import dump
    from pretrain.config.violation import InvalidConfigError

    try:
        composition = compose_leniently(args.overrides, args.config_dir)
    except InvalidConfigError as error:
        print(error, file=sys.stderr)
        return INVALID
    cwd = os.getcwd()
    tree = resolve_paths(composition.tree, cwd)
    try:
        config = check(tree, composition.violations)
        tree = resolve_paths(complete_tree(tree, config), cwd)
    except InvalidConfigError as error:
        if not args.engine:
            print(dump(tree), end="")
        print(error, file=sys.stderr)
        return INVALID
    print(_engine_settings(config) if args.engine else dump(tree), end="")
    return 0


def _check(args: Namespace) -> int:
    from pretrain.config.compose import load_run_config
    from pretrain.config.violation import InvalidConfigError

    try:
        tree, config = load_run_config(args.overrides, args.config_dir)
    except InvalidConfigError as error:
        print(error, file=sys.stderr)
        return INVALID
    print(_summary(config, {name: tree[name]["_target_"] for name in ("model", "data", "objective")}))
    return 0


def _engine_settings(config: Config) -> str:
    """What the engine is given: DeepSpeed's JSON, or the fields of Megatron-Core's objects and the cut, as YAML."""
    from pretrain.config.schema import DeepSpeedConfig

    if isinstance(config.engine, DeepSpeedConfig):
        import json

        from pretrain.engines.deepspeed_settings import deepspeed_settings

        return json.dumps(deepspeed_settings(config), indent=2) + "\n"
    import yaml

    from pretrain.engines.megatron_settings import megatron_settings

    blocks: dict[str, Any] = {**megatron_settings(config), "pipeline": _pipeline_cut(config)}
    return yaml.safe_dump(blocks, sort_keys=False, default_flow_style=False, width=100)


def _pipeline_cut(config: Config) -> list[dict[str, Any]]:
    """The chunks in model order, each with its rank, its layers and its share of the forward FLOPs."""
    from pretrain.engines.build import megatron_stages, sequence_length
    from pretrain.parallel.pipeline import stage_cost

    ranks = megatron_stages(config)
    ends = config.model.end_costs()
    costs = config.model.layer_costs(sequence_length(config))
    total = sum(costs) + sum(ends)
    return [
        {
            "rank": rank,
            "layers": f"{stage.first}-{stage.stop - 1}",
            "holds": [name for name in ("embedding", "head") if getattr(stage, f"has_{name}")],
            "share_of_cost": round(stage_cost(stage, costs, ends) / total, 4),
        }
        for chunk in zip(*ranks, strict=True)
        for rank, stage in enumerate(chunk)
    ]


def _summary(config: Config, targets: dict[str, str]) -> str:
    from pretrain.config.layout import data_parallel_size

    train = config.train
    data_parallel = data_parallel_size(config)
    accumulation = train.global_batch_size // (train.micro_batch_size * data_parallel)
    lines = [
        f"OK: run {config.run.name!r}, seed {config.run.seed}",
        *(f"  {name:<10} {target}" for name, target in targets.items()),
        f"  {'steps':<10} {train.steps} of {train.global_batch_size} sequences"
        f" (data parallel {data_parallel} x micro-batches {accumulation} x {train.micro_batch_size}),"
        f" {train.precision}",
        f"  {'engine':<10} {_engine_line(config.engine, data_parallel)}",
        f"  {'optimizer':<10} {config.optimizer.name}, peak learning rate {config.optimizer.learning_rate:g},"
        f" {config.optimizer.schedule.kind} after {config.optimizer.schedule.warmup_steps} warm-up steps"
        + _offload_words(config.optimizer),
    ]
    return "\n".join(lines)


def _offload_words(optimizer: OptimizerChoice) -> str:
    from pretrain.config.schema import OptimizerConfig

    if not isinstance(optimizer, OptimizerConfig) or not optimizer.offload.enabled:
        return ""
    shares = {"updated on the device": optimizer.offload.fraction, "resident": optimizer.offload.resident_fraction}
    shown = ", ".join(f"{what} {share if isinstance(share, str) else f'{share:g}'}" for what, share in shares.items())
    return f", state offloaded ({shown})"


def _engine_line(engine: EngineConfig, data_parallel: int) -> str:
    from pretrain.config.schema import DeepSpeedConfig

    if isinstance(engine, DeepSpeedConfig):
        parts = [f"{engine.name}, ZeRO stage {engine.zero_stage}"]
        offloaded = [what for what in ("optimizer", "parameters") if getattr(engine, f"offload_{what}")]
        if offloaded:
            parts.append(f"{' and '.join(offloaded)} offloaded")
    else:
        tensor, pipeline = engine.tensor_parallel, engine.pipeline_parallel
        parts = [f"{engine.name}, tensor {tensor} x pipeline {pipeline} x data {data_parallel}"]
        if engine.sequence_parallel:
            parts.append("sequence parallel")
        if engine.virtual_pipeline > 1:
            parts.append(f"{engine.virtual_pipeline} interleaved chunks a pipeline rank")
        if engine.distributed_optimizer:
            parts.append("distributed optimizer")
    return ", ".join(parts)
