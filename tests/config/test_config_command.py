"""``pretrain config``: the tree, the summary and the engines' final settings as they are printed."""

from __future__ import annotations

import argparse
import json
import os

import pytest
import yaml

from pretrain.commands import config as command
from pretrain.config.check import check
from pretrain.config.freeze import load

PARTS = "components_of_a_user.parts"


def run_cli(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv))


@pytest.fixture
def tiny(config_dir: str, package_folder: str) -> list[str]:
    """The shipped experiment, on data of a user's."""
    return ["--config-dir", config_dir, "experiment=tiny", "data=mine", f"run.import_paths=['{package_folder}']"]


def test_config_show_prints_a_tree_that_can_be_frozen(config_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("show", "experiment=mine", "--config-dir", config_dir) == 0
    tree = load(capsys.readouterr().out)
    assert tree["run"]["root"] == os.path.join(os.getcwd(), "runs")
    assert check(tree).model.width == 16


def test_config_check_exits_with_2_and_lists_all_faults(config_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("check", "experiment=mine", "--config-dir", config_dir) == 0
    assert f"{PARTS}.Model" in capsys.readouterr().out
    assert run_cli("check", "experiment=mine", "train.stepz=1", "model.width=x", "--config-dir", config_dir) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "2 faults" in printed.err
    assert run_cli("show", "experiment=mine", "model.width=x", "--config-dir", config_dir) == 2
    printed = capsys.readouterr()
    assert load(printed.out)["model"]["width"] == "x"
    assert "1 fault" in printed.err


@pytest.mark.parametrize(
    ("overrides", "steps", "engine"),
    [
        ("launcher.num_processes=2", "data parallel 2 x micro-batches 1 x 2", "deepspeed, ZeRO stage 1"),
        (
            "engine.zero_stage=3 engine.offload_optimizer=true engine.offload_parameters=true",
            "data parallel 1 x micro-batches 2 x 2",
            "deepspeed, ZeRO stage 3, optimizer and parameters offloaded",
        ),
        (
            "engine=megatron engine.tensor_parallel=2 engine.sequence_parallel=true launcher.num_processes=4",
            "data parallel 2 x micro-batches 1 x 2",
            "megatron, tensor 2 x pipeline 1 x data 2, sequence parallel, distributed optimizer",
        ),
        (
            "engine=megatron engine.pipeline_parallel=2 engine.virtual_pipeline=2 engine.distributed_optimizer=false"
            " launcher.num_processes=2",
            "data parallel 1 x micro-batches 2 x 2",
            "megatron, tensor 1 x pipeline 2 x data 1, 2 interleaved chunks a pipeline rank",
        ),
    ],
)
def test_the_summary_describes_the_engine(
    tiny: list[str], capsys: pytest.CaptureFixture[str], overrides: str, steps: str, engine: str
) -> None:
    assert run_cli("check", *tiny, "launcher.num_processes=1", *overrides.split()) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert steps in lines["steps"]
    assert lines["engine"].split(maxsplit=1)[1] == engine


def test_show_engine_prints_deepspeeds_json(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["launcher.num_processes=2", "engine.zero_stage=3", "engine.persistence_threshold=77"]
    assert run_cli("show", "--engine", *tiny, *overrides) == 0
    settings = json.loads(capsys.readouterr().out)
    assert settings["train_batch_size"] == 4
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["stage3_param_persistence_threshold"] == 77


def test_show_engine_prints_megatrons_objects_and_the_cut(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    layout = "engine=megatron engine.pipeline_parallel=2 engine.virtual_pipeline=2 launcher.num_processes=2"
    assert run_cli("show", "--engine", *tiny, *layout.split(), "train.clip_grad_norm=null") == 0
    blocks = yaml.safe_load(capsys.readouterr().out)
    assert blocks["parallel"]["virtual_pipeline_model_parallel_size"] == 2
    assert blocks["optimizer"]["clip_grad"] == float("inf")
    cut = blocks["pipeline"]
    assert [(chunk["rank"], chunk["layers"], chunk["holds"]) for chunk in cut] == [
        (0, "0-0", ["embedding"]),
        (1, "1-1", []),
        (0, "2-2", []),
        (1, "3-3", ["head"]),
    ]
    assert sum(chunk["share_of_cost"] for chunk in cut) == pytest.approx(1, abs=1e-3)
    # The head of 4,096 rows of 32 outweighs any layer of so small a model: 2 x 32 x 4096 FLOPs a token.
    assert max(cut, key=lambda chunk: chunk["share_of_cost"])["holds"] == ["head"]


def test_show_engine_of_a_faulty_configuration_prints_the_faults_alone(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("show", "--engine", *tiny, "launcher.num_processes=1", "engine.zero_stage=4") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "engine.zero_stage" in printed.err
