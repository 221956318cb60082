"""Impossible layouts and options that an engine cannot honour are refused, together and with reasons."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pretrain.config.check import check, complete_tree
from pretrain.config.layout import data_parallel_size, model_parallel_size
from pretrain.config.schema import DeepSpeedConfig, MegatronConfig
from pretrain.config.violation import InvalidConfigError, Violation

Tree = Callable[..., dict[str, Any]]


def faults(tree: dict[str, Any]) -> dict[str, Violation]:
    with pytest.raises(InvalidConfigError) as caught:
        check(tree)
    found = {v.path: v for v in caught.value.violations}
    assert len(found) == len(caught.value.violations), "a path is reported twice"
    return found


def megatron(**fields: Any) -> dict[str, Any]:
    return {"name": "megatron", **fields}


def test_the_name_chooses_the_engine_and_its_defaults(hybrid_tree: Tree) -> None:
    assert check(hybrid_tree()).engine == DeepSpeedConfig()
    assert check(hybrid_tree(engine={"zero_stage": 3})).engine == DeepSpeedConfig(zero_stage=3)
    tree = hybrid_tree(engine=megatron(tensor_parallel=2, pipeline_parallel=2), launcher__num_processes=8)
    config = check(tree)
    assert config.engine == MegatronConfig(tensor_parallel=2, pipeline_parallel=2)
    assert (model_parallel_size(config.engine), data_parallel_size(config)) == (4, 2)
    complete = complete_tree(tree, config)
    assert complete["engine"]["distributed_optimizer"] is True
    assert check(complete) == config


def test_a_key_of_the_other_engine_says_where_it_belongs(hybrid_tree: Tree) -> None:
    found = faults(hybrid_tree(engine=megatron(zero_stage=1, tensor_paralel=1)))
    assert set(found) == {"engine.zero_stage", "engine.tensor_paralel"}
    assert found["engine.zero_stage"].fix.startswith("zero_stage belongs to engine deepspeed; ")
    assert found["engine.tensor_paralel"].fix == "did you mean engine.tensor_parallel?"
    # Close to a key of this engine, but exactly one of the other: engine.bucket_size would be a wrong guess.
    found = faults(hybrid_tree(engine=megatron(allgather_bucket_size=1)))
    assert "engine=deepspeed" in found["engine.allgather_bucket_size"].fix


@pytest.mark.parametrize(("name", "fix"), [("megatorn", "did you mean engine=megatron?"), (3, "engine=deepspeed")])
def test_a_wrong_engine_is_the_only_fault_of_its_node(hybrid_tree: Tree, name: object, fix: str) -> None:
    found = faults(hybrid_tree(engine={"name": name, "tensor_parallel": "x"}, train__steps="x"))
    assert set(found) == {"train.steps", "engine.name"}
    assert found["engine.name"].rule == "must be deepspeed or megatron"
    assert found["engine.name"].fix == fix


def test_an_engine_that_is_no_mapping_is_described(hybrid_tree: Tree) -> None:
    assert faults(hybrid_tree(engine=[1]))["engine"].rule == "must be a mapping whose name is deepspeed or megatron"


TWO = {"launcher__num_processes": 2}
RULES: list[tuple[dict[str, Any], dict[str, Any], str, str, str]] = [
    # engine fields, other changes, path, part of the rule, part of the fix
    (
        {"tensor_parallel": 2, "pipeline_parallel": 2},
        {"launcher__num_processes": 6},
        "launcher.num_processes",
        "2 x 2 = 4",
        "launcher.num_processes=4 or launcher.num_processes=8",
    ),
    ({"tensor_parallel": 2}, {}, "launcher.num_processes", "2 x 1 = 2", "nearest: launcher.num_processes=2"),
    (
        {"tensor_parallel": 2},
        {"launcher__num_processes": 6},
        "train.global_batch_size",
        "2 x 3 = 6",
        "train.global_batch_size=6 or train.global_batch_size=12",
    ),
    ({"sequence_parallel": True}, {}, "engine.sequence_parallel", "false without tensor", "tensor_parallel=2"),
    (
        {"tensor_parallel": 2, "sequence_parallel": True},
        {**TWO, "data__sequence_length": 63},
        "data.sequence_length",
        "sequence_parallel",
        "64",
    ),
    ({"virtual_pipeline": 2}, {}, "engine.virtual_pipeline", "1 without a pipeline", "pipeline_parallel=2"),
    (
        {"pipeline_parallel": 2, "virtual_pipeline": 2},
        {**TWO, "train__global_batch_size": 6},
        "train.global_batch_size",
        "6 / 2 = 3",
        "train.global_batch_size=4 or train.global_batch_size=8",
    ),
    (
        {"pipeline_parallel": 8},
        {"launcher__num_processes": 8},
        "engine.pipeline_parallel",
        "the model has 4 layers",
        "pipeline_parallel=4 or less",
    ),
    (
        {"pipeline_parallel": 2, "virtual_pipeline": 4},
        TWO,
        "engine.pipeline_parallel",
        "2 x 4",
        "pipeline_parallel=1 or less, or engine.virtual_pipeline=1",
    ),
    (
        {"pipeline_parallel": 2, "pipeline_split": [1, 4, 0]},
        TWO,
        "engine.pipeline_split",
        "2 numbers, one for each of the 2 x 1 chunks and at least one layer in each chunk and a sum of 4",
        "even would be [2,2]",
    ),
    ({"tensor_parallel": 2}, {**TWO, "model__mamba2__groups": 1}, "model.mamba2.groups", "tensor-parallel", "set"),
    ({"tensor_parallel": 2}, {**TWO, "model__vocab_size": 257}, "model.vocab_size", "equal share", "258"),
    (
        {"overlap_param_gather": True, "distributed_optimizer": False},
        {},
        "engine.overlap_param_gather",
        "engine.overlap_grad_reduce=true and engine.distributed_optimizer=true",
        "engine.overlap_param_gather=false",
    ),
    (
        {"tensor_parallel": 2},
        {**TWO, "train__sample_interval": 5, "train__sample_prompts": ["a"]},
        "train.sample_interval",
        "no rank holds the whole model",
        "pretrain generate",
    ),
    (
        {"pass_through": {"ddp": {"bucket_size": 3}}},
        {},
        "engine.pass_through.ddp.bucket_size",
        "",
        "engine.bucket_size",
    ),
    ({"pipeline_parallel": 0}, {}, "engine.pipeline_parallel", "at least 1", "at least 1"),
]


@pytest.mark.parametrize(("engine", "changes", "path", "rule", "fix"), RULES)
def test_each_rule_of_megatron(
    hybrid_tree: Tree, engine: dict[str, Any], changes: dict[str, Any], path: str, rule: str, fix: str
) -> None:
    found = faults(hybrid_tree(engine=megatron(**engine), **changes))
    assert set(found) == {path}
    assert rule in found[path].rule
    assert fix in found[path].fix


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ({"tensor_parallel": 2, "sequence_parallel": True}, {"launcher__num_processes": 4}),
        ({"pipeline_parallel": 4, "pipeline_split": [1, 1, 1, 1]}, {"launcher__num_processes": 4}),
        ({"pipeline_parallel": 2, "virtual_pipeline": 2}, {"launcher__num_processes": 2, "train__precision": "bf16"}),
        ({"overlap_param_gather": True, "overlap_grad_reduce": True, "bucket_size": 1000}, {}),
        ({}, {"train__sample_interval": 5, "train__sample_prompts": ["a"]}),
        ({"pass_through": {"ddp": {"check_for_nan_in_grad": True}}}, {}),
    ],
)
def test_possible_layouts_pass(hybrid_tree: Tree, engine: dict[str, Any], changes: dict[str, Any]) -> None:
    assert check(hybrid_tree(engine=megatron(**engine), **changes)).engine == MegatronConfig(**engine)


def test_all_faults_of_a_layout_come_together_whatever_else_is_wrong(hybrid_tree: Tree) -> None:
    engine = megatron(tensor_parallel=3, pipeline_parallel=5, overlap_grad_reduce="yes", zero_stage=3)
    tree = hybrid_tree(engine=engine, launcher__num_processes=4, train__steps="x", model__attention__num_kv_heads=3)
    tree["engine"]["pass_through"] = {"dpp": {}}
    assert set(faults(tree)) == {
        "train.steps",
        "engine.zero_stage",
        "engine.overlap_grad_reduce",
        "model.attention.num_kv_heads",
        "launcher.num_processes",
        "engine.pipeline_parallel",
        "model.vocab_size",
        "model.attention.num_heads",
        "model.mlp.hidden_size",
        "model.mamba2.groups",
        "model.mamba2.head_dim",
        "engine.pass_through.dpp",
    }


@pytest.mark.parametrize("part", ["Model", "Module"])
def test_models_without_parallel_layers_are_left_to_deepspeed(make_tree: Tree, part: str) -> None:
    model = {"_target_": f"components_of_a_user.parts.{part}", "width": 8}
    found = faults(make_tree(model=model, engine=megatron()))
    assert set(found) == {"engine.name"}
    assert part in found["engine.name"].rule
    assert found["engine.name"].fix == "engine=deepspeed trains any model"
    check(make_tree(model=model, engine={"name": "deepspeed", "zero_stage": 3}))


def test_deepspeeds_own_rules_run_beside_faults_of_other_fields(hybrid_tree: Tree) -> None:
    engine = {"zero_stage": 0, "offload_optimizer": True, "reduce_bucket_size": "big"}
    found = faults(hybrid_tree(engine=engine, train__precision="bf16", train__steps=0))
    assert set(found) == {"engine.zero_stage", "engine.offload_optimizer", "engine.reduce_bucket_size", "train.steps"}


def test_sampling_at_stage_3_is_refused(hybrid_tree: Tree) -> None:
    tree = hybrid_tree(engine={"zero_stage": 3}, train__sample_interval=5, train__sample_prompts=["a"])
    assert set(faults(tree)) == {"train.sample_interval"}


def test_another_version_of_megatron_is_refused_before_anything_starts(
    hybrid_tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9.9" if name == "megatron-core" else installed(name)
    )
    check(hybrid_tree())
    violation = faults(hybrid_tree(engine=megatron()))["engine.name"]
    assert "megatron-core 9.9.9 is installed" in violation.rule
    assert "engine=deepspeed" in violation.fix


@pytest.mark.parametrize("engine", [{"name": "deepspeed", "zero_stage": 3}, megatron(tensor_parallel=3)])
def test_checking_an_engine_loads_none(hybrid_tree: Tree, engine: dict[str, Any]) -> None:
    code = (
        "import json, sys\n"
        "from pretrain.config.check import check\n"
        "try:\n    check(json.loads(sys.argv[1]))\n"
        "except ValueError:\n    pass\n"
        "print([m for m in ('torch', 'deepspeed', 'megatron.core') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(hybrid_tree(engine=engine))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
