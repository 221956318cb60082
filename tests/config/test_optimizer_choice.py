"""The optimizer is one of several, told apart by name, and stays that of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain.config.check import check, complete_tree
from pretrain.config.compose import compose
from pretrain.config.freeze import extend
from pretrain.config.schema import MuonConfig, OptimizerConfig
from pretrain.config.violation import InvalidConfigError, Violation

Tree = Callable[..., dict[str, Any]]


def faults(tree: dict[str, Any]) -> dict[str, Violation]:
    with pytest.raises(InvalidConfigError) as caught:
        check(tree)
    return {v.path: v for v in caught.value.violations}


def test_the_name_chooses_the_optimizer_and_its_defaults(make_tree: Tree) -> None:
    assert check(make_tree()).optimizer == OptimizerConfig()
    # As runs were frozen before there was a choice.
    assert check(make_tree(optimizer={"name": "adamw", "weight_decay": 0.2})).optimizer.weight_decay == 0.2
    tree = make_tree(optimizer={"name": "muon", "momentum": 0.9})
    config = check(tree)
    assert config.optimizer == MuonConfig(momentum=0.9)
    complete = complete_tree(tree, config)
    assert complete["optimizer"]["newton_schulz_steps"] == 5
    assert check(complete) == config


@pytest.mark.parametrize(("name", "default"), [("adamw", OptimizerConfig()), ("muon", MuonConfig())])
def test_a_shipped_file_says_the_defaults_of_the_schema(make_tree: Tree, name: str, default: object) -> None:
    assert check(make_tree(optimizer=compose([f"optimizer={name}"])["optimizer"])).optimizer == default


def test_faults_of_muon_are_reported_together(make_tree: Tree) -> None:
    fields = {"momentum": 1.0, "newton_schulz_steps": 0, "newton_schulz_precision": "fp16", "nesterov": True}
    found = faults(make_tree(optimizer={"name": "muon", **fields}))
    assert {"optimizer.momentum", "optimizer.newton_schulz_precision", "optimizer.nesterov"} <= set(found)
    assert "less than 1" in found["optimizer.momentum"].rule


def test_a_key_of_the_other_optimizer_says_where_it_belongs(make_tree: Tree) -> None:
    found = faults(make_tree(optimizer={"name": "adamw", "momentum": 0.9}))
    assert found["optimizer.momentum"].fix.startswith("momentum belongs to optimizer muon; ")
    found = faults(make_tree(optimizer={"name": "moun"}))
    assert found["optimizer.name"].fix == "did you mean optimizer=muon?"


@pytest.mark.parametrize("override", ["optimizer=muon", "optimizer.name=muon"])
def test_a_run_keeps_its_optimizer(make_tree: Tree, override: str) -> None:
    tree = make_tree()
    with pytest.raises(InvalidConfigError, match="optimizer"):
        extend(complete_tree(tree, check(tree)), [override])
