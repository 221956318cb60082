from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest

from pretrain.config.check import check
from pretrain.config.compose import (
    compose,
    compose_leniently,
    group_options,
    load_run_config,
    resolve_paths,
    shipped_config_dir,
)
from pretrain.config.freeze import dump, load
from pretrain.config.schema import EngineConfig, TrainConfig
from pretrain.config.violation import InvalidConfigError, Violation

PARTS = "components_of_a_user.parts"
SYNTHETIC = ["induction", "mqar", "phonebook", "selective_copying"]  # their data are made on the spot
EXPERIMENTS = sorted({path.stem for path in (shipped_config_dir() / "experiment").glob("*.yaml")} - {*SYNTHETIC})


def faults(*overrides: str, config_dir: str | None = None) -> dict[str, Violation]:
    with pytest.raises(InvalidConfigError) as caught:
        load_run_config(overrides, config_dir)
    return {v.path: v for v in caught.value.violations}


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_shipped_experiments_lack_nothing_but_the_data(
    experiment: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(faults(*([f"experiment={experiment}"] if experiment else []))) == {"data.path"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_shipped_experiments_pass_with_data(experiment: str, config_dir: str, package_folder: str) -> None:
    overrides = [f"experiment={experiment}", "data=mine", f"run.import_paths=['{package_folder}']"]
    tree, config = load_run_config([*overrides, "launcher.num_processes=1"], config_dir)
    assert config.run.name == experiment
    assert check(load(dump(tree))) == config


@pytest.mark.parametrize("experiment", SYNTHETIC)
def test_synthetic_experiments_run_as_they_are(experiment: str) -> None:
    tree, config = load_run_config([f"experiment={experiment}"])
    assert config.run.name == experiment
    assert check(load(dump(tree))) == config
    assert config.objective.accuracy
    assert config.launcher.threads_per_process == 1
    # The model has a row for every token, and not many more.
    assert config.data.vocab_size == config.model.vocab_size


def test_the_demo_is_what_its_comment_says() -> None:
    tree = compose(["experiment=demo"])
    assert tree["train"]["global_batch_size"] * tree["data"]["sequence_length"] == 4096
    assert tree["launcher"]["num_processes"] == 2


def test_tracking_is_switched_off_by_its_group() -> None:
    assert compose(["tracking=disabled"])["tracking"] == {"enabled": False}


def test_a_users_folder_adds_options_and_comes_first(config_dir: str) -> None:
    assert {"mine", "hybrid_3m"} <= set(group_options("model", config_dir))
    _, config = load_run_config(["experiment=mine", "train.steps=5"], config_dir)
    assert config.run.name == "mine"
    assert config.model.width == 16
    assert config.data.vocab_size == 4096
    assert config.launcher.num_processes == 4
    assert config.train.steps == 5
    assert config.engine.zero_stage == 1


def test_the_order_of_groups_and_values_on_the_command_line_does_not_matter(config_dir: str) -> None:
    values_first = compose(["model.width=99", "experiment=mine"], config_dir)
    assert values_first == compose(["experiment=mine", "model.width=99"], config_dir)
    assert values_first["model"]["width"] == 99


def test_values_are_merged_added_and_removed() -> None:
    tree = compose(["train={steps: 3}", "+train.extra=1", "++new.deep.key=[1,a]", "~tracking.uri", "run.name='a b'"])
    assert tree["train"]["steps"] == 3
    assert tree["train"]["micro_batch_size"] == 2
    assert tree["train"]["extra"] == 1
    assert tree["new"] == {"deep": {"key": [1, "a"]}}
    assert "uri" not in tree["tracking"]
    assert tree["run"]["name"] == "a b"


def test_unknown_keys_on_the_command_line_are_all_reported() -> None:
    found = faults("train.stepz=1", "+engine.zero_stag=1", "modle=hybrid_3m", "optimizer.schedule.warmup=3")
    assert found["train.stepz"].fix == "did you mean train.steps?"
    assert found["engine.zero_stag"].fix == "did you mean engine.zero_stage?"
    assert found["modle"].fix == "did you mean model?"
    assert found["optimizer.schedule.warmup"].fix == "did you mean optimizer.schedule.warmup_steps?"


def test_faults_of_composition_and_of_the_check_come_together() -> None:
    found = faults(
        "model=hybird_3m",
        "engine.zero_stage=7",
        "run.name=${nowhere}",
        "train.steps=[1",
        "train.seed=1,2",
        "engine/x=y",
        "~tracking.nothing",
        "objective._target_=not_there.X",
    )
    assert "did you mean model=hybrid_3m" in found["model"].fix
    assert "hybrid_tiny" in found["model"].fix
    assert "nowhere" in found["run.name"].rule
    assert "grammar" in found["train.steps"].rule
    assert "sweep" in found["train.seed"].rule
    assert "groups:" in found["engine/x"].fix
    assert "that is there" in found["tracking.nothing"].rule
    assert "or 3 (parameters too)" in found["engine.zero_stage"].rule
    assert "not_there" in found["objective._target_"].rule


def test_values_below_a_scalar_are_reported() -> None:
    assert any(path.startswith("train.steps") for path in faults("train.steps.x=3"))


def test_an_unknown_experiment_stops_composition() -> None:
    with pytest.raises(InvalidConfigError) as caught:
        compose_leniently(["experiment=dmeo", "train.steps=[1"])
    assert [v.path for v in caught.value.violations] == ["experiment", "train.steps"]
    assert "did you mean experiment=demo" in caught.value.violations[0].fix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# @package _global_\ndefaults: [override /model: nope]\n", "model/nope"),
        ("defaults: [override /tracking: off]\n", "Unsupported item value"),  # YAML reads "off" as false
        ("a: [1\n", r"experiment/bad\.yaml"),
    ],
)
def test_broken_config_files_are_named(config_dir: str, text: str, message: str) -> None:
    (Path(config_dir) / "experiment/bad.yaml").write_text(text)
    with pytest.raises(InvalidConfigError, match=message) as caught:
        compose(["experiment=bad"], config_dir)
    assert config_dir in caught.value.violations[0].fix


def test_a_missing_config_dir_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="existing folder"):
        compose([], str(tmp_path / "nowhere"))


def test_paths_become_absolute(package_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    tree: dict[str, Any] = {
        "run": {"root": "../runs", "import_paths": [package_folder, "lib"], "name": "x"},
        "tracking": {"store": "~/store", "uri": "relative"},
        "data": {
            "_target_": f"{PARTS}.Data",
            "path": "here/set",
            "extra_paths": ["a", "s3://bucket/b", "/c"],
        },
        "model": {"_target_": f"{PARTS}.Module", "width": 3},
        "objective": "text",
    }
    resolved = resolve_paths(tree, "/work/place")
    assert resolved["run"]["root"] == "/work/runs"
    assert resolved["run"]["import_paths"] == [package_folder, "/work/place/lib"]
    assert resolved["tracking"] == {"store": "/home/someone/store", "uri": "relative"}
    assert resolved["data"]["path"] == "/work/place/here/set"
    assert resolved["data"]["extra_paths"] == ["/work/place/a", "s3://bucket/b", "/c"]
    assert resolve_paths(resolved, "/elsewhere") == resolved
    assert tree["run"]["root"] == "../runs"


def test_a_node_that_names_another_engine_replaces_the_one_before() -> None:
    assert compose(["engine={zero_stage: 2}"])["engine"]["overlap_comm"] is False  # merged into the shipped file
    assert compose(["engine={name: deepspeed, zero_stage: 2}"])["engine"]["overlap_comm"] is False
    other = compose(["engine={name: megatron, tensor_parallel: 2}"])["engine"]
    assert other == {"name": "megatron", "tensor_parallel": 2}
    assert compose(["run={name: other}"])["run"]["seed"] == 1234  # a name that chooses nothing


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_the_shipped_file_of_an_engine_writes_out_every_field_and_its_default(engine: str) -> None:
    node = compose([f"engine={engine}"])["engine"]
    members = {member().name: member for member in get_args(EngineConfig)}
    assert asdict(members[engine]()) == node


def test_the_primary_file_writes_out_every_field_of_the_loop_and_its_default() -> None:
    assert compose([])["train"] == asdict(TrainConfig())
