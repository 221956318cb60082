"""What the offloading subclasses rest on inside DeepSpeed: tables of it are complete, other releases are refused."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from typing import Any

import pytest
from support.offload_engine_case import OffloadCase

from pretrain.config.schema import OffloadConfig
from pretrain.engines import deepspeed_offload
from pretrain.engines.deepspeed_import import import_deepspeed
from pretrain.engines.deepspeed_settings import deepspeed_violations

deepspeed = import_deepspeed("cpu")

from pretrain.engines import deepspeed_offload_zero  # noqa: E402

PAIRS = {
    "engine.DeepSpeedEngine": deepspeed_offload_zero.OffloadingEngine,
    "zero.stage3.DeepSpeedZeroOptimizer_Stage3": deepspeed_offload_zero.OffloadedStage3,
    "zero.stage_1_and_2.DeepSpeedZeroOptimizer": deepspeed_offload_zero.OffloadedStages1And2,
}


def _names_of(node: ast.AST) -> set[str]:
    """Attributes of ``self`` in a class."""
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    }


def test_the_installed_release_is_as_expected() -> None:
    deepspeed_offload.require_tested_deepspeed()
    assert deepspeed_offload.contract_violations() == []


@pytest.mark.parametrize("path", PAIRS)
def test_every_overridden_method_is_checked(path: str) -> None:
    ours = PAIRS[path]
    base = ours.__mro__[1]
    overridden = {name for name in vars(ours) if inspect.isfunction(vars(ours)[name]) and hasattr(base, name)}
    assert overridden == set(deepspeed_offload.OVERRIDDEN[path])
    for name in overridden:
        expected = deepspeed_offload.OVERRIDDEN[path][name]
        parameters = tuple(inspect.signature(vars(ours)[name]).parameters)[1:]
        assert expected is None or parameters == expected


@pytest.mark.parametrize("path", list(deepspeed_offload.CALLED))
def test_every_called_method_is_checked(path: str) -> None:
    ours = PAIRS[path]
    base = ours.__mro__[1]
    named = _names_of(ast.parse(inspect.getsource(ours)))
    methods = {name for name in named if callable(getattr(base, name, None)) and name not in vars(ours)}
    assert methods == set(deepspeed_offload.CALLED[path])


@pytest.mark.parametrize("path", list(deepspeed_offload.CALLED))
def test_every_attribute_that_is_read_exists(path: str) -> None:
    ours = PAIRS[path]
    base = ours.__mro__[1]
    named = _names_of(ast.parse(inspect.getsource(ours)))
    # Set in a constructor of the base class, or a property or method of it.
    source = "".join(inspect.getsource(cls) for cls in base.__mro__ if cls is not object)
    set_there = {
        n.attr
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and getattr(n.value, "id", "") == "self"
    }
    own = set(vars(ours)) | set(getattr(ours, "__annotations__", {}))
    assert {name for name in named if name not in own | set_there and not hasattr(base, name)} == set()


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.19.7", "0.20.0", "1.0"):
        monkeypatch.setattr(deepspeed, "__version__", version)
        with pytest.raises(RuntimeError, match=f"its version is {version}; install the version in constraints.txt"):
            deepspeed_offload.require_tested_deepspeed()


def test_a_changed_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def partition_grads(self: Any, params: Any) -> None: ...

    def step(self: Any, closure: Any = None) -> None:
        self._post_step(None)

    monkeypatch.setattr(DeepSpeedZeroOptimizer_Stage3, "partition_grads", partition_grads)
    monkeypatch.setattr(DeepSpeedZeroOptimizer_Stage3, "step", step)
    monkeypatch.delattr(DeepSpeedZeroOptimizer, "scaled_global_norm")
    with pytest.raises(RuntimeError) as caught, deepspeed_offload.offloading_engine():
        pass
    text = str(caught.value)
    assert "partition_grads takes (params), expected (params_to_release, grad_partitions)" in text
    assert "zero.stage_1_and_2.DeepSpeedZeroOptimizer has no scaled_global_norm" in text
    assert "its step at stage 3 calls _post_step, expected _get_norm_groups" in text


def test_only_inside_are_classes_exchanged() -> None:
    before = deepspeed.DeepSpeedEngine
    with deepspeed_offload.offloading_engine():
        assert deepspeed.DeepSpeedEngine is deepspeed_offload_zero.OffloadingEngine
    assert deepspeed.DeepSpeedEngine is before


@pytest.mark.parametrize(
    ("norm", "loss_scale", "clip_norm", "expected"),
    [(4.0, 1.0, 2.0, 2.0 / 4.000001), (4.0, 1.0, 0.0, 1.0), (1.0, 1.0, 2.0, 1.0), (8.0, 2.0, 2.0, 1.0 / 4.000001)],
)
def test_the_factor_is_deepspeeds(norm: float, loss_scale: float, clip_norm: float, expected: float) -> None:
    assert deepspeed_offload.factor(norm, loss_scale, clip_norm) == pytest.approx(expected, rel=1e-12)


def test_bf16_at_stage_1_reads_what_stage_2_reads() -> None:
    """With offloaded states DeepSpeed's bf16 optimizer, which has no buckets, is not the one."""
    case = OffloadCase(stage=1, size=2, precision="bf16", overlap=True)
    assert list(deepspeed_violations(case.config())) == []
    plain = replace(case, offload=OffloadConfig())
    assert "engine.overlap_comm" in {violation.path for violation in deepspeed_violations(plain.config())}
