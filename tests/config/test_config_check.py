from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import pytest

from pretrain.config.check import check, complete_tree, schema_leaves
from pretrain.config.ranges import RANGES
from pretrain.config.violation import InvalidConfigError, Violation

MakeTree = Callable[..., dict[str, Any]]


def faults(tree: dict[str, Any]) -> dict[str, Violation]:
    with pytest.raises(InvalidConfigError) as caught:
        check(tree)
    found = {v.path: v for v in caught.value.violations}
    assert len(found) == len(caught.value.violations), "a path is reported twice"
    return found


def test_a_valid_tree_is_typed(make_tree: MakeTree) -> None:
    config = check(make_tree(optimizer__betas=[0.8, 0.9], optimizer__learning_rate=1, train__steps=7))
    assert config.optimizer.betas == (0.8, 0.9)
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.train.steps == 7
    assert config.model.width == 8


@pytest.mark.parametrize(
    ("path", "value", "rule", "fix"),
    [
        ("train.steps", "200", "a whole number", "train.steps=200"),
        ("train.steps", "many", "a whole number", "100"),
        ("train.steps", 2e2, "a whole number", "train.steps=200"),
        ("train.steps", True, "a whole number", "100"),
        ("train.steps", None, "a whole number", "100"),
        ("train.clip_grad_norm", "none", "a number or null", "1.0"),
        ("train.clip_grad_norm", False, "a number or null", "1.0"),
        ("train.precision", "bf61", "one of fp32, bf16", "did you mean train.precision=bf16"),
        ("tracking.enabled", 1, "true or false", "true"),
        ("run.name", 5, "text", "run.name='\"5\"'"),
        ("run.import_paths", "lib", "a list", "list"),
        ("optimizer.betas", [0.9], "a list of 2", "list of 2"),
        ("optimizer.schedule", 3, "a mapping", "mapping"),
        ("train", [], "a mapping", "mapping"),
        ("model.inner", 4, "a mapping with depth, scale", "mapping"),
        ("model.width", "???", "required", "model.width="),
        ("train.steps", "???", "required", "train.steps="),
    ],
)
def test_wrong_types_are_not_converted(make_tree: MakeTree, path: str, value: object, rule: str, fix: str) -> None:
    violation = faults(make_tree(**{path.replace(".", "__"): value}))[path]
    assert violation.found == value
    assert rule in violation.rule
    assert fix in violation.fix


def test_elements_of_lists_are_checked_one_by_one(make_tree: MakeTree) -> None:
    found = faults(make_tree(train__sample_prompts=["a", 3, None], optimizer__betas=["x", 0.9]))
    assert set(found) == {"train.sample_prompts[1]", "train.sample_prompts[2]", "optimizer.betas[0]"}


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("train.stepz", "train.steps"),
        ("trian", "train"),
        ("optimizer.schedule.warmup_step", "optimizer.schedule.warmup_steps"),
        ("model.widht", "model.width"),
        ("model.inner.dept", "model.inner.depth"),
        ("objective.zloss", "objective.z_loss"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.zero_stage", "engine.zero_stage"),
    ],
)
def test_unknown_keys_get_a_suggestion(make_tree: MakeTree, path: str, suggestion: str) -> None:
    violation = faults(make_tree(**{path.replace(".", "__"): 1}))[path]
    assert "unknown key" in violation.rule
    assert violation.fix == f"did you mean {suggestion}?"


def test_an_unknown_key_with_nothing_close_lists_the_known_ones(make_tree: MakeTree) -> None:
    assert "zero_stage" in faults(make_tree(engine__xyzzy=1))["engine.xyzzy"].fix


@pytest.mark.parametrize(
    ("changes", "path", "found", "rule", "fix"),
    [
        (
            {"train__global_batch_size": 7, "launcher__num_processes": 2},
            "train.global_batch_size",
            7,
            "2 x 2 = 4",
            "train.global_batch_size=4 or train.global_batch_size=8",
        ),
        (
            {"train__global_batch_size": 3, "launcher__num_processes": 2},
            "train.global_batch_size",
            3,
            "= 4",
            "nearest: train.global_batch_size=4",
        ),
        ({"data__vocab_size": 300}, "model.vocab_size", 256, "300", "model.vocab_size=300"),
        ({"data__sequence_length": 129}, "data.sequence_length", 129, "128", "data.sequence_length=128"),
        (
            {"optimizer__schedule__warmup_steps": 11, "train__steps": 10},
            "optimizer.schedule.warmup_steps",
            11,
            "train.steps = 10",
            "10 or less",
        ),
        (
            {"optimizer__schedule__warmup_steps": 11, "optimizer__schedule__horizon": 5},
            "optimizer.schedule.warmup_steps",
            11,
            "optimizer.schedule.horizon = 5",
            "5 or less",
        ),
        ({"engine__zero_stage": 4}, "engine.zero_stage", 4, "or 3 (parameters too)", "zero_stage=3"),
        (
            {"engine__zero_stage": 0, "train__precision": "bf16"},
            "engine.zero_stage",
            0,
            "DeepSpeed accumulates no fp32 gradients",
            "engine.zero_stage=1",
        ),
        ({"train__sample_interval": 5}, "train.sample_prompts", [], "at least one", "sample_interval=0"),
        (
            {"train__keep_best": 2, "train__eval_interval": 0},
            "train.keep_best",
            2,
            "validation loss",
            "eval_interval=100",
        ),
        ({"run__name": "a/b c"}, "run.name", "a/b c", "folder name", "run.name=a-b-c"),
        ({"data__path": "broken"}, "data.path", "broken", "must hold a data set", "prepare it"),
    ],
)
def test_each_cross_field_rule(
    make_tree: MakeTree, changes: dict[str, Any], path: str, found: object, rule: str, fix: str
) -> None:
    everything = faults(make_tree(**changes))
    assert set(everything) == {path}
    assert everything[path].found == found
    assert rule in everything[path].rule
    assert fix in everything[path].fix


def test_rules_accept_their_limits(make_tree: MakeTree) -> None:
    check(
        make_tree(
            train__global_batch_size=4,
            launcher__num_processes=2,
            data__sequence_length=128,
            optimizer__schedule__warmup_steps=10,
            train__steps=10,
            optimizer__betas=[0, 0.999],
            train__precision="bf16",
            model__max_sequence_length=None,
        )
    )


def test_missing_import_path_is_reported(make_tree: MakeTree, tmp_path: Any) -> None:
    tree = make_tree()
    tree["run"]["import_paths"].append(str(tmp_path / "nowhere"))
    assert "existing folder" in faults(tree)["run.import_paths[1]"].rule


def test_every_number_of_the_schema_has_a_range() -> None:
    numeric = set()
    for path, annotation, _ in schema_leaves():
        if get_origin(annotation) is Literal:
            continue
        if get_origin(annotation) is tuple:
            numeric |= {f"{path}[{i}]" for i, _ in enumerate(get_args(annotation))}
        elif {int, float} & {annotation, *get_args(annotation)}:
            numeric.add(path)
    assert numeric == set(RANGES) | {"engine.zero_stage"}


@pytest.mark.parametrize("path", sorted(RANGES))
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_numbers_outside_their_range_are_refused(path: str, value: float) -> None:
    assert not RANGES[path].holds(value)


def test_numbers_out_of_range_are_reported_and_do_not_reach_rules(make_tree: MakeTree) -> None:
    found = faults(make_tree(train__micro_batch_size=0, optimizer__betas=[0.9, 1.0], train__keep_checkpoints=0))
    assert set(found) == {"train.micro_batch_size", "optimizer.betas[1]", "train.keep_checkpoints"}
    assert found["train.micro_batch_size"].rule == "must be at least 1"
    assert found["optimizer.betas[1]"].rule == "must be at least 0 and less than 1"


def test_all_faults_are_reported_together(make_tree: MakeTree) -> None:
    # Wrong types inside train, model and data must not keep rules over their sound siblings from running.
    tree = make_tree(
        train__steps="x",
        train__global_batch_size=7,
        train__typo=1,
        model__width="wide",
        model__max_sequence_length=32,
        model__vocab_size=100,
        data__read_ahead=None,
        data__sequence_length=64,
        engine__zero_stage=5,
        objective__z_loss="small",
        tracking__uri=3,
    )
    found = faults(tree)
    assert set(found) == {
        "train.steps",
        "train.global_batch_size",
        "train.typo",
        "model.width",
        "model.vocab_size",
        "data.read_ahead",
        "data.sequence_length",
        "engine.zero_stage",
        "objective.z_loss",
        "tracking.uri",
    }
    with pytest.raises(InvalidConfigError) as caught:
        check(tree)
    text = str(caught.value)
    assert text.startswith("the configuration has 10 faults:")
    for violation in found.values():
        for part in (violation.path, repr(violation.found), violation.rule, violation.fix):
            assert part in text


def test_rules_over_unreadable_data_are_left_to_the_data_itself(make_tree: MakeTree) -> None:
    target = "components_of_a_user.parts.UnpreparedData"
    config = check(make_tree(data___target_=target))
    with pytest.raises(ValueError, match="no manifest"):
        _ = config.data.vocab_size


def test_missing_components_are_reported(make_tree: MakeTree) -> None:
    tree = make_tree()
    del tree["model"], tree["data"]["_target_"], tree["objective"]
    assert set(faults(tree)) == {"model", "data._target_", "objective"}


def test_faults_of_earlier_stages_come_first_and_are_not_repeated(make_tree: MakeTree) -> None:
    earlier = [Violation("train.steps", "${x}", "r", "f"), Violation("model", "hybird", "r", "f")]
    tree = make_tree(train__steps="???", engine__zero_stage=9)
    tree["model"] = "???"
    with pytest.raises(InvalidConfigError) as caught:
        check(tree, earlier)
    assert [v.path for v in caught.value.violations] == ["train.steps", "model", "engine.zero_stage"]


def test_the_complete_tree_gives_the_same_configuration(make_tree: MakeTree) -> None:
    tree = make_tree(model__inner={"depth": 3}, optimizer__betas=[0, 0.5])
    config = check(tree)
    complete = complete_tree(tree, config)
    assert complete["model"]["inner"] == {"depth": 3, "scale": 1.0}
    assert complete["optimizer"]["betas"] == [0.0, 0.5]
    assert complete["launcher"]["num_processes"] == 1
    assert check(complete) == config
    assert complete_tree(complete, check(complete)) == complete


def test_importing_the_configuration_is_light() -> None:
    code = (
        "import sys, pretrain.config.check, pretrain.config.compose, pretrain.config.freeze;"
        "import pretrain.commands.config;"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'yaml', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
