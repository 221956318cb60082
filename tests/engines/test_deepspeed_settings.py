"""What DeepSpeed is told, and which settings it would not honour."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pretrain.config.schema import Config, DeepSpeedConfig, LocalConfig, TrainConfig
from pretrain.engines.deepspeed_settings import deepspeed_settings, deepspeed_violations


def config(precision: str = "fp32", sample_interval: int = 0, **engine: Any) -> Config:
    return Config(
        train=TrainConfig(
            global_batch_size=24,
            micro_batch_size=2,
            precision=precision,  # type: ignore[arg-type]
            sample_interval=sample_interval,
        ),
        engine=DeepSpeedConfig(**engine),
        launcher=LocalConfig(num_processes=4),
    )


def paths(checked: Config) -> list[str]:
    return [violation.path for violation in deepspeed_violations(checked)]


@pytest.mark.parametrize(
    ("checked", "path"),
    [
        (config(zero_stage=4), "engine.zero_stage"),
        (config(zero_stage=-1), "engine.zero_stage"),
        (config("bf16", zero_stage=0), "engine.zero_stage"),
        (config(zero_stage=0, offload_optimizer=True), "engine.offload_optimizer"),
        (config(zero_stage=2, offload_parameters=True), "engine.offload_parameters"),
        (config(zero_stage=0, overlap_comm=True), "engine.overlap_comm"),
        (config("bf16", zero_stage=1, overlap_comm=True), "engine.overlap_comm"),
        (config("bf16", zero_stage=1, reduce_bucket_size=7), "engine.reduce_bucket_size"),
        (config(zero_stage=3, allgather_bucket_size=7), "engine.allgather_bucket_size"),
        (config(zero_stage=2, prefetch_bucket_size=7), "engine.prefetch_bucket_size"),
        (config(zero_stage=2, persistence_threshold=7), "engine.persistence_threshold"),
        (config(sample_interval=5, zero_stage=3), "train.sample_interval"),
    ],
)
def test_what_a_stage_does_not_honour_is_refused(checked: Config, path: str) -> None:
    assert paths(checked) == [path]


@pytest.mark.parametrize(
    "checked",
    [
        config(zero_stage=0, sample_interval=5),
        config(zero_stage=1, overlap_comm=True, offload_optimizer=True),
        config("bf16", zero_stage=1, overlap_comm=True, offload_optimizer=True),
        config("bf16", zero_stage=1, allgather_bucket_size=7),
        config("bf16", zero_stage=2, overlap_comm=True, reduce_bucket_size=7),
        config("bf16", zero_stage=3, overlap_comm=True, offload_optimizer=True, offload_parameters=True),
        config(zero_stage=3, prefetch_bucket_size=7, persistence_threshold=7),
        config(zero_stage=3, offload_parameters=True),
    ],
)
def test_what_a_stage_honours_is_accepted(checked: Config) -> None:
    assert paths(checked) == []


def test_several_faults_are_told_together() -> None:
    faulty = config("bf16", zero_stage=0, offload_optimizer=True, offload_parameters=True, overlap_comm=True)
    assert paths(faulty) == [
        "engine.zero_stage",
        "engine.offload_optimizer",
        "engine.offload_parameters",
        "engine.overlap_comm",
    ]


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"train_batch_size": 8}, "train.global_batch_size"),
        ({"bf16": {"enabled": True}}, "train.precision"),
        ({"optimizer": {"type": "Lamb"}}, "follows from optimizer"),
        ({"activation_checkpointing": {}}, "train.activation_checkpointing"),
        ({"zero_optimization": {"stage": 1}}, "engine.zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "engine.offload_optimizer"),
        ({"zero_optimization": {"stage3_param_persistence_threshold": 1}}, "engine.persistence_threshold"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "change results or the layout"),
        ({"zero_optimization": {"stage3_max_live_parameters": 1}}, "reads it at stage 3 only"),
        ({"zero_optimization": 3}, "a mapping"),
        ({"steps_per_prin": 3}, "unknown to DeepSpeed"),
    ],
)
def test_pass_through_refuses_with_the_reason(block: dict[str, Any], words: str) -> None:
    (violation,) = deepspeed_violations(config(zero_stage=2, pass_through=block))
    assert violation.path.startswith("engine.pass_through.")
    assert words in violation.rule


def test_pass_through_reaches_deepspeed() -> None:
    block = {
        "steps_per_print": 10,
        "zero_optimization": {"sub_group_size": 1000, "offload_optimizer": {"pin_memory": False}},
    }
    checked = config(zero_stage=3, offload_optimizer=True, pass_through=block)
    assert paths(checked) == []
    settings = deepspeed_settings(checked)
    assert settings["steps_per_print"] == 10
    assert settings["zero_optimization"]["sub_group_size"] == 1000
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert settings["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_itself_accepts_the_settings(stage: int, precision: str) -> None:
    from pretrain.engines.deepspeed_import import import_deepspeed

    import_deepspeed("cpu")
    from deepspeed.runtime.config import DeepSpeedConfig as Json
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    offload = {"offload_optimizer": stage > 0, "offload_parameters": stage == 3}
    settings = deepspeed_settings(config(precision, zero_stage=stage, **offload))
    settings["train_batch_size"] = 6  # DeepSpeed checks the batch against the one process that runs this test
    parsed = Json(settings)
    assert parsed.gradient_accumulation_steps == 3
    zero = parsed.zero_config
    assert (zero.stage, zero.overlap_comm if stage else False) == (stage, False)
    if stage == 3:
        assert zero.param_persistence_threshold == 100_000
        assert (zero.offload_param.device, zero.offload_optimizer.device) == ("cpu", "cpu")
    # Keys that experts may pass exist in the installed version.
    from pretrain.engines.deepspeed_settings import _ZERO_KEYS

    known = {name for key, field in DeepSpeedZeroConfig.model_fields.items() for name in (key, field.alias)}
    assert set(_ZERO_KEYS) <= known


def test_the_settings_need_neither_torch_nor_deepspeed() -> None:
    check = (
        "import sys, pretrain.engines.deepspeed_settings as s;"
        "assert not {'torch', 'deepspeed'} & sys.modules.keys(), 'imports torch'"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
