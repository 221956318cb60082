"""A residual stream in fp32 between the stages of a bf16 pipeline, and the options of blocks and attention there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.hybrid import changed
from support.lm_case import Case, differing, state_of, train_and_save

from pretrain.config.schema import MegatronConfig
from pretrain.engines.megatron_settings import megatron_settings


def case_of(size: int, engine: MegatronConfig, precision: str = "bf16") -> Case:
    changes = {
        "pattern": "*-*-",
        "residual_fp32": True,
        "logit_softcap": 10.0,
        "norm.placement": "peri",
        "norm.kind": "layer",
        "norm.embedding": True,
        "attention.qk_norm": True,
        "attention.windows": (5, None),
        "attention.gate": "head",
    }
    model = changed(Case(engine, size, tied=False).config().model, changes)
    return Case(engine, size, micro_batch=4, precision=precision, clip=None, model_config=model)


def test_stages_hand_on_the_stream_in_its_own_precision() -> None:
    settings = megatron_settings(case_of(2, MegatronConfig(pipeline_parallel=2)).config())
    assert settings["transformer"]["pipeline_dtype"] == "fp32"
    assert settings["transformer"]["params_dtype"] == "bf16"
    plain = megatron_settings(Case(MegatronConfig(pipeline_parallel=2), 2, precision="bf16").config())
    assert plain["transformer"]["pipeline_dtype"] == "bf16"


@pytest.mark.distributed
@pytest.mark.slow
def test_a_bf16_pipeline_repeats_one_process_bit_for_bit(worker_pools: Any, tmp_path: Path) -> None:
    """Which it could not if the stream were rounded between stages."""
    one, two = case_of(1, MegatronConfig()), case_of(2, MegatronConfig(pipeline_parallel=2))
    for case in (one, two):
        worker_pools(case.size, case.pool).run(train_and_save, case, tmp_path / str(case.size), 3)
    first, second = (state_of(tmp_path / str(case.size) / "step_00000003") for case in (one, two))
    assert differing(first, second) == []
    assert any("q_norm" in name for name in first)
