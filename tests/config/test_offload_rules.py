"""``optimizer.offload``: ranges, combinations, unread fields, and changing it when a run is continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from pretrain.config.check import check, complete_tree
from pretrain.config.compose import compose, resolve_paths
from pretrain.config.freeze import Difference, extend, extendable_paths, frozen_for_new_run
from pretrain.config.schema import OffloadConfig
from pretrain.config.violation import InvalidConfigError, Violation

Tree = Callable[..., dict[str, Any]]

OTHER_VALUES: dict[str, Any] = {
    "fraction": 0.5,
    "resident_fraction": "auto",
    "subgroup_size": 1000,
    "host_memory_gib": 8.0,
    "master": "low_bits",
    "overlap": False,
    "cpu_threads": 2,
    "replan_interval": 0,
    "timeline_interval": 10,
}


def faults(tree: dict[str, Any]) -> dict[str, Violation]:
    with pytest.raises(InvalidConfigError) as caught:
        check(tree)
    return {v.path.removeprefix("optimizer.offload."): v for v in caught.value.violations}


def offloading(**changes: Any) -> dict[str, Any]:
    return {"enabled": True, **changes}


def test_the_shipped_block_says_the_defaults_and_nothing_is_offloaded(make_tree: Tree) -> None:
    composed = compose([])["optimizer"]["offload"]
    assert check(make_tree(optimizer__offload=composed)).optimizer.offload == OffloadConfig()
    assert check(make_tree()).optimizer.offload.enabled is False


def test_every_field_has_another_value_here() -> None:
    assert {f.name for f in fields(OffloadConfig)} == {"enabled", *OTHER_VALUES}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fraction", -0.1),
        ("fraction", 1.5),
        ("fraction", float("nan")),
        ("resident_fraction", 2),
        ("subgroup_size", 0),
        ("host_memory_gib", 0.0),
        ("host_memory_gib", float("inf")),
        ("cpu_threads", 0),
        ("replan_interval", -1),
        ("timeline_interval", -1),
    ],
)
def test_numbers_out_of_range_are_refused(make_tree: Tree, field: str, value: float) -> None:
    found = faults(make_tree(optimizer__offload=offloading(**{field: value})))
    assert set(found) == {field}


@pytest.mark.parametrize(("field", "value"), [("fraction", "most"), ("master", "half"), ("fraction", True)])
def test_other_words_are_refused(make_tree: Tree, field: str, value: object) -> None:
    assert set(faults(make_tree(optimizer__offload=offloading(**{field: value})))) == {field}


@pytest.mark.parametrize("value", ["auto", 0, 0.0, 0.37, 1])
def test_fractions_are_shares_or_auto_without_a_device_too(make_tree: Tree, value: object) -> None:
    block = offloading(fraction=value, resident_fraction=value)
    tree = make_tree(optimizer__offload=block, launcher={"device": "cpu"})
    assert check(tree).optimizer.offload == OffloadConfig(enabled=True, fraction=value, resident_fraction=value)


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_a_field_that_nothing_reads_is_refused(make_tree: Tree, field: str) -> None:
    found = faults(make_tree(optimizer__offload={field: OTHER_VALUES[field]}))
    assert set(found) == {field}
    assert "optimizer.offload.enabled=true" in found[field].fix
    enabled = make_tree(optimizer__offload=offloading(**{field: OTHER_VALUES[field]}), train__precision="bf16")
    assert getattr(check(enabled).optimizer.offload, field) == OTHER_VALUES[field]


@pytest.mark.parametrize(
    ("engine", "path", "fix"),
    [
        ({"zero_stage": 0}, "engine.zero_stage", "engine.zero_stage=1"),
        ({"offload_optimizer": True}, "engine.offload_optimizer", "engine.offload_optimizer=false"),
        ({"zero_stage": 3, "offload_parameters": True}, "engine.offload_parameters", "engine.offload_parameters=false"),
        (
            {"name": "megatron", "distributed_optimizer": False},
            "engine.distributed_optimizer",
            "engine.distributed_optimizer=true",
        ),
    ],
)
def test_an_engine_that_cannot_offload_is_refused_only_then(
    hybrid_tree: Tree, engine: dict[str, Any], path: str, fix: str
) -> None:
    check(hybrid_tree(engine=engine))
    found = faults(hybrid_tree(engine=engine, optimizer__offload=offloading()))
    assert set(found) == {path}
    assert fix in found[path].fix
    assert "optimizer.offload.enabled=false" in found[path].fix


@pytest.mark.parametrize("engine", [{"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"name": "megatron"}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layouts_that_can(hybrid_tree: Tree, engine: dict[str, Any], precision: str) -> None:
    assert check(hybrid_tree(engine=engine, train__precision=precision, optimizer__offload=offloading()))


def test_fields_that_deepspeed_reads_with_offload_only_are_judged_so(hybrid_tree: Tree) -> None:
    engine = {"zero_stage": 1, "overlap_comm": True}
    found = faults(hybrid_tree(engine=engine, train__precision="bf16"))
    assert set(found) == {"engine.overlap_comm"}
    check(hybrid_tree(engine=engine, train__precision="bf16", optimizer__offload=offloading()))


def test_low_bits_need_bf16_weights(make_tree: Tree) -> None:
    found = faults(make_tree(optimizer__offload=offloading(master="low_bits"), train__precision="fp32"))
    assert set(found) == {"master"}
    assert "train.precision=bf16" in found["master"].fix


def test_all_faults_are_reported_together(make_tree: Tree) -> None:
    tree = make_tree(
        optimizer__offload=offloading(master="low_bits", fraction=2, cpu_threads=0),
        engine={"zero_stage": 0, "offload_optimizer": True},
    )
    found = faults(tree)
    assert {"master", "fraction", "cpu_threads", "engine.zero_stage", "engine.offload_optimizer"} <= set(found)


def test_muon_says_why_it_has_no_such_block(make_tree: Tree) -> None:
    found = faults(make_tree(optimizer={"name": "muon", "offload": {"enabled": True}}))
    (violation,) = found.values()
    assert violation.path == "optimizer.offload"
    assert "whole matrices" in violation.fix
    assert "optimizer=adamw" in violation.fix


@pytest.fixture
def frozen(make_tree: Tree) -> dict[str, Any]:
    tree = make_tree(train__precision="bf16")
    return frozen_for_new_run(resolve_paths(complete_tree(tree, check(tree)), "/home"))


def test_everything_may_change_when_a_run_is_continued(frozen: dict[str, Any]) -> None:
    names = [f"optimizer.offload.{f.name}" for f in fields(OffloadConfig)]
    assert set(names) <= set(extendable_paths(frozen))
    overrides = ["optimizer.offload.enabled=true"]
    overrides += [f"optimizer.offload.{name}={value}" for name, value in OTHER_VALUES.items()]
    tree, changes = extend(frozen, overrides)
    assert tree["optimizer"]["offload"] == {"enabled": True, **OTHER_VALUES}
    assert {change.path for change in changes} == set(names)
    back, _ = extend(
        tree,
        [
            f"optimizer.offload.{f.name}={'null' if f.default is None else str(f.default).lower()}"
            for f in fields(OffloadConfig)
        ],
    )
    assert back == frozen
    # Switched off by one word; what is named besides is judged as ever.
    assert extend(tree, ["optimizer.offload.enabled=false"])[0] == frozen
    with pytest.raises(InvalidConfigError, match="nothing reads it"):
        extend(tree, ["optimizer.offload.enabled=false", "optimizer.offload.fraction=0.25"])


def test_a_run_from_before_the_block_existed_takes_it_up(frozen: dict[str, Any]) -> None:
    old = {**frozen, "optimizer": {key: value for key, value in frozen["optimizer"].items() if key != "offload"}}
    tree, changes = extend(old, [])
    assert tree == frozen
    assert changes == []
    tree, changes = extend(old, ["optimizer.offload.enabled=true"])
    assert tree["optimizer"]["offload"]["enabled"] is True
    assert changes == [Difference("optimizer.offload.enabled", "<absent>", True)]
    assert "offload" not in old["optimizer"]


def test_a_run_with_muon_cannot_take_it_up(make_tree: Tree) -> None:
    tree = make_tree(optimizer={"name": "muon"})
    with pytest.raises(InvalidConfigError, match="whole matrices"):
        extend(complete_tree(tree, check(tree)), ["optimizer.offload.enabled=true"])
