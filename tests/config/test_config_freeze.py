from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.config.check import check, complete_tree
from pretrain.config.compose import resolve_paths
from pretrain.config.freeze import (
    ABSENT,
    Difference,
    config_digest,
    differences,
    dump,
    extend,
    extendable_paths,
    frozen_for_new_run,
    load,
)
from pretrain.config.schema import MegatronConfig
from pretrain.config.violation import InvalidConfigError

MakeTree = Callable[..., dict[str, Any]]

texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
trees = st.dictionaries(
    texts,
    st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=12),
    max_size=6,
)


def exactly(value: Any) -> Any:
    """A value in which 1, 1.0 and True, and 0.0 and -0.0, differ."""
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exactly(item) for item in value]
    return (type(value), value.hex() if isinstance(value, float) else value)


@settings(max_examples=150, deadline=None)
@given(trees)
@example({"lr": 1e-05, "big": 1e22, "small": 5e-324, "zero": -0.0, "inf": float("inf")})
@example(
    {
        "a": "1e-5",
        "b": "yes",
        "c": "null",
        "d": "0x10",
        "e": "2020-01-01",
        "f": "",
        "g": "def ",
        "h": "=",
        "~": "<<",
    }
)
@example({"<<": {"a": 1}, "on": 1, "1": 2})
def test_dump_and_load_give_the_same_tree(tree: dict[str, Any]) -> None:
    assert exactly(load(dump(tree))) == exactly(tree)


@settings(max_examples=50, deadline=None)
@given(trees, st.randoms())
def test_dump_and_digest_do_not_depend_on_the_order_of_keys(tree: dict[str, Any], random: Any) -> None:
    keys = list(tree)
    random.shuffle(keys)
    shuffled = {key: tree[key] for key in keys}
    assert dump(shuffled) == dump(tree)
    assert config_digest(shuffled) == config_digest(tree)


def test_the_digest_sees_every_bit_of_a_float() -> None:
    assert config_digest({"a": 0.1}) != config_digest({"a": 0.1 + 2**-56})


def test_dump_repeats_shared_values_instead_of_aliasing_them() -> None:
    shared = [1, 2]
    assert "&" not in dump({"a": shared, "b": shared})


@pytest.mark.parametrize("text", ["- 1", "", "a: [1", "plain"])
def test_load_names_the_file_that_is_no_mapping(text: str) -> None:
    with pytest.raises(ValueError, match=r"RUN/config\.yaml"):
        load(text, "RUN/config.yaml")


@settings(max_examples=100, deadline=None)
@given(trees, trees)
def test_differences_vanish_exactly_for_equal_trees(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert differences(a, a) == []
    undone = [(d.path, d.after, d.before) for d in differences(a, b)]
    assert undone == [(d.path, d.before, d.after) for d in differences(b, a)]


def test_differences_name_changed_added_and_removed_leaves() -> None:
    a = {"x": {"same": 1, "changed": [1, 2], "gone": None}}
    b = {"x": {"same": 1, "changed": [1, 3], "new": {}}}
    assert differences(a, b) == [
        Difference("x.changed", [1, 2], [1, 3]),
        Difference("x.gone", None, ABSENT),
        Difference("x.new", ABSENT, {}),
    ]


@pytest.fixture
def frozen(make_tree: MakeTree) -> dict[str, Any]:
    tree = make_tree(train__steps=200, optimizer__schedule__warmup_steps=20)
    return frozen_for_new_run(resolve_paths(complete_tree(tree, check(tree)), "/home"))


def test_a_new_run_freezes_the_horizon_at_its_steps(frozen: dict[str, Any], make_tree: MakeTree) -> None:
    assert frozen["optimizer"]["schedule"]["horizon"] == 200
    given_horizon = make_tree(train__steps=200, optimizer__schedule__horizon=900)
    complete = complete_tree(given_horizon, check(given_horizon))
    assert frozen_for_new_run(complete)["optimizer"]["schedule"]["horizon"] == 900


def test_extending_steps_leaves_the_horizon(frozen: dict[str, Any]) -> None:
    before = dump(frozen)
    tree, changes = extend(frozen, ["train.steps=600", "train.sample_prompts=[one,two]", "data.read_ahead=4"])
    assert changes == [
        Difference("data.read_ahead", 2, 4),
        Difference("train.sample_prompts", [], ["one", "two"]),
        Difference("train.steps", 200, 600),
    ]
    assert tree["optimizer"]["schedule"]["horizon"] == 200
    assert dump(frozen) == before
    assert check(tree).train.steps == 600


@pytest.mark.parametrize(("value", "horizon"), [("450", 450), ("null", 600)])
def test_the_horizon_moves_when_it_is_named(frozen: dict[str, Any], value: str, horizon: int) -> None:
    tree, _ = extend(frozen, ["train.steps=600", f"optimizer.schedule.horizon={value}"])
    assert tree["optimizer"]["schedule"]["horizon"] == horizon


def test_everything_else_is_refused_all_at_once(frozen: dict[str, Any]) -> None:
    overrides = [
        "model.width=16",
        "optimizer.learning_rate=1.0",
        "experiment=demo",
        "train.stepz=600",
        "~train.steps",
        "train.eval_interval=often",
        "train.keep_checkpoints=0",
        "train.steps=[1",
    ]
    with pytest.raises(InvalidConfigError) as caught:
        extend(frozen, overrides)
    violations = {v.path: v for v in caught.value.violations if v.path != "train.steps"}
    assert set(violations) == {
        "model.width",
        "optimizer.learning_rate",
        "experiment",
        "train.stepz",
        "train.eval_interval",
        "train.keep_checkpoints",
    }
    assert [v.path for v in caught.value.violations].count("train.steps") == 2
    assert "train.steps" in violations["model.width"].fix
    assert "extendable" in violations["model.width"].rule
    assert violations["train.stepz"].fix == "did you mean train.steps?"


def test_repeating_a_frozen_value_changes_nothing(frozen: dict[str, Any]) -> None:
    tree, changes = extend(frozen, ["model.width=8", "train.steps=200"])
    assert changes == []
    assert tree == frozen


def test_an_extension_must_pass_the_rules(frozen: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        extend(frozen, ["optimizer.schedule.horizon=10"])
    assert [v.path for v in caught.value.violations] == ["optimizer.schedule.warmup_steps"]


def test_interpolations_do_not_enter_a_frozen_tree(frozen: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match="no interpolations"):
        extend(frozen, ["train.steps=${run.seed}"])


def test_relative_paths_of_an_extension_start_at_the_working_folder(frozen: dict[str, Any]) -> None:
    tree, changes = extend(frozen, ["tracking.store=mine"], cwd="/somewhere")
    assert tree["tracking"]["store"] == "/somewhere/mine"
    assert changes == [Difference("tracking.store", "/home/mlruns", "/somewhere/mine")]


@pytest.fixture
def frozen_hybrid(hybrid_tree: MakeTree) -> dict[str, Any]:
    tree = hybrid_tree(train__steps=200, engine={"zero_stage": 2})
    return frozen_for_new_run(resolve_paths(complete_tree(tree, check(tree)), "/home"))


MOVE = ["engine=megatron", "engine.tensor_parallel=2", "launcher.num_processes=2"]


@pytest.mark.parametrize("overrides", [MOVE, MOVE[::-1]])
def test_a_run_moves_to_another_engine(frozen_hybrid: dict[str, Any], overrides: list[str]) -> None:
    tree, changes = extend(frozen_hybrid, overrides)
    assert check(tree).engine == MegatronConfig(tensor_parallel=2)
    assert tree["engine"] == {**asdict(MegatronConfig()), "tensor_parallel": 2}
    listed = {change.path: (change.before, change.after) for change in changes}
    assert listed["engine.name"] == ("deepspeed", "megatron")
    assert listed["engine.zero_stage"] == (2, ABSENT)
    assert listed["engine.tensor_parallel"] == (ABSENT, 2)
    assert listed["launcher.num_processes"] == (1, 2)
    assert {path.partition(".")[0] for path in listed} == {"engine", "launcher"}
    back, _ = extend(tree, ["engine={name: deepspeed, zero_stage: 2}", "launcher.num_processes=1"])
    assert back == frozen_hybrid


def test_choosing_the_same_engine_again_takes_its_shipped_values(frozen_hybrid: dict[str, Any]) -> None:
    _, changes = extend(frozen_hybrid, ["engine=deepspeed"])
    assert changes == [Difference("engine.zero_stage", 2, 1)]


@pytest.mark.parametrize(
    ("override", "path", "fix"),
    [
        ("engine=megatorn", "engine", "did you mean engine=megatron? options: deepspeed, megatron"),
        ("engine=null", "engine", "options: deepspeed, megatron"),
        ("engine={name: megatron, bucket_size: '${run.seed}'}", "engine", "write it out"),
        ("engine={name: megatron, zero_stage: 1}", "engine.zero_stage", "zero_stage belongs to engine deepspeed"),
        ("engine.tensor_parallel=2", "engine.tensor_parallel", "belongs to engine megatron"),
        ("~engine", "engine", "start a new run"),
    ],
)
def test_moves_that_are_none_are_refused(frozen_hybrid: dict[str, Any], override: str, path: str, fix: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        extend(frozen_hybrid, [override])
    assert [v.path for v in caught.value.violations] == [path]
    assert fix in caught.value.violations[0].fix


def test_a_move_must_fit_the_model_and_the_number_of_processes(frozen: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        extend(frozen, ["engine=megatron", "engine.pipeline_parallel=2"])
    assert {v.path for v in caught.value.violations} == {"engine.name", "launcher.num_processes"}


def test_a_run_frozen_before_a_field_existed_goes_on_with_its_default(frozen_hybrid: dict[str, Any]) -> None:
    old = copy.deepcopy(frozen_hybrid)
    old["engine"] = {key: old["engine"][key] for key in ("name", "zero_stage", "reduce_bucket_size", "overlap_comm")}
    for key in ("keep_every", "keep_best", "async_checkpoints", "activation_checkpointing", "trace"):
        del old["train"][key]
    assert check(old) == check(frozen_hybrid)
    tree, changes = extend(old, ["train.steps=300", "train.keep_every=100"])
    assert changes == [Difference("train.keep_every", ABSENT, 100), Difference("train.steps", 200, 300)]
    assert tree["engine"] == frozen_hybrid["engine"]


def test_extendable_paths_include_those_of_component_classes(frozen: dict[str, Any]) -> None:
    paths = extendable_paths(frozen)
    assert {"train.steps", "tracking.uri", "optimizer.schedule.horizon", "data.read_ahead"} <= set(paths)
    assert {"engine.name", "engine.zero_stage", "engine.tensor_parallel"} <= set(paths)
    assert len(paths) == len(set(paths))
    assert not {"model.width", "train.global_batch_size", "data.path"} & set(paths)
