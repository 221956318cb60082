"""Options of Megatron-Core that the engine would ignore or that would break it are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain.config.check import check
from pretrain.config.schema import MegatronConfig
from pretrain.config.violation import InvalidConfigError, Violation

Tree = Callable[..., dict[str, Any]]
PIPELINE = {"pipeline_parallel": 2}
TWO = {"launcher__num_processes": 2}


def only_fault(tree: dict[str, Any]) -> Violation:
    with pytest.raises(InvalidConfigError) as caught:
        check(tree)
    (violation,) = caught.value.violations
    return violation


@pytest.mark.parametrize(
    ("block", "field", "value", "rule", "fix"),
    [
        ("transformer", "hidden_dropout", 0.1, "Megatron's own model, which is not built here", "remove it"),
        ("transformer", "num_moe_experts", 4, "no effect", "remove it"),
        ("transformer", "fp8", "e4m3", "no effect", "remove it"),
        ("transformer", "q_lora_rank", 8, "Megatron's own model", "remove it"),
        ("transformer", "gradient_accumulation_fusion", True, "Apex", "remove it"),
        ("transformer", "no_sync_func", "f", "the engine hands to Megatron itself", "remove it"),
        ("transformer", "hidden_size", 8, "this platform sets it", "set model.width instead"),
        ("transformer", "microbatch_group_size_per_vp_stage", 4, "evaluation", "remove it"),
        ("ddp", "average_in_collective", True, "changes results", "remove it"),
        ("ddp", "gradient_reduce_div_fusion", False, "no effect", "remove it"),
        ("ddp", "check_for_nan_in_grads", True, "check_for_large_grads", "did you mean check_for_nan_in_grad?"),
        ("ddp", "check_for_nan_in_grad", "true", "a bool, found str", "check_for_nan_in_grad=true"),
        ("ddp", "check_for_large_grads", 1, "a bool, found int", "check_for_large_grads=true"),
        ("optimizer", "loss_scale", 2.0, "scales losses", "remove it"),
        ("optimizer", "sgd_momentum", 0.5, "AdamW", "remove it"),
        ("optimizer", "log_num_zeros_in_grad", True, "nothing reads", "remove it"),
        ("optimizer", "zzz", 1, "a field of the installed Megatron-Core", "remove it"),
    ],
)
def test_a_field_that_is_not_honoured_is_refused(
    hybrid_tree: Tree, block: str, field: str, value: object, rule: str, fix: str
) -> None:
    found = only_fault(hybrid_tree(engine={"name": "megatron", "pass_through": {block: {field: value}}}))
    assert found.path == f"engine.pass_through.{block}.{field}"
    assert rule in found.rule
    assert fix in found.fix


@pytest.mark.parametrize(
    ("engine", "changes", "path", "rule", "fix"),
    [
        ({"bucket_size": 1000}, {}, "engine.bucket_size", "at once", "engine.overlap_grad_reduce=true"),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True},
            {"train__sample_interval": 5, "train__sample_prompts": ["a"]},
            "train.sample_interval",
            "rank 0 alone generates",
            "train.sample_interval=0",
        ),
        (
            {"pass_through": {"transformer": {"deallocate_pipeline_outputs": True}}},
            {},
            "engine.pass_through.transformer.deallocate_pipeline_outputs",
            "does not act",
            "engine.pipeline_parallel=2 or more",
        ),
        (
            {**PIPELINE, "virtual_pipeline": 2, "pass_through": {"transformer": {"deallocate_pipeline_outputs": True}}},
            TWO,
            "engine.pass_through.transformer.deallocate_pipeline_outputs",
            "left out",
            "engine.virtual_pipeline=1",
        ),
        (
            {"distributed_optimizer": False, "pass_through": {"ddp": {"pad_buckets_for_high_nccl_busbw": True}}},
            {},
            "engine.pass_through.ddp.pad_buckets_for_high_nccl_busbw",
            "does not act",
            "engine.distributed_optimizer=true",
        ),
    ],
)
def test_an_option_is_refused_where_it_does_not_act_or_breaks(
    hybrid_tree: Tree, engine: dict[str, Any], changes: dict[str, Any], path: str, rule: str, fix: str
) -> None:
    found = only_fault(hybrid_tree(engine={"name": "megatron", **engine}, **changes))
    assert found.path == path
    assert rule in found.rule
    assert fix in found.fix


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ({**PIPELINE, "pass_through": {"transformer": {"deallocate_pipeline_outputs": True}}}, TWO),
        ({"pass_through": {"ddp": {"pad_buckets_for_high_nccl_busbw": True, "check_for_large_grads": True}}}, {}),
        ({"overlap_grad_reduce": True, "bucket_size": 1000}, {}),
        ({"overlap_param_gather": True, "overlap_grad_reduce": True}, {}),
    ],
)
def test_options_pass_where_they_act(hybrid_tree: Tree, engine: dict[str, Any], changes: dict[str, Any]) -> None:
    assert check(hybrid_tree(engine={"name": "megatron", **engine}, **changes)).engine == MegatronConfig(**engine)
