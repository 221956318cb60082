"""A checkpoint of another model is refused before anything starts or changes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.command import pretrain
from support.lm_case import Case
from support.logical import logical_tensors
from support.saving import new_save, whole

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.config.schema import MegatronConfig
from pretrain.parallel.layers import TorchLayers
from pretrain.training.model_check import check_checkpoint_model


def test_a_layer_too_many_is_named_without_an_engine(tmp_path: Path) -> None:
    config = Case(MegatronConfig(pipeline_parallel=2), 2).config()
    model = config.model.build(TorchLayers())
    fragments = [whole(name, "master", tensor) for name, tensor in logical_tensors(model).items()]
    path = new_save(tmp_path, 1).write(fragments, {"step": 1}).path
    check_checkpoint_model(config, path)
    shorter = dataclasses.replace(config.model, pattern=config.model.pattern[:-1])
    with pytest.raises(CheckpointError, match=r"layers\.7\.mixer\.out_proj\.weight: not in the model"):
        check_checkpoint_model(dataclasses.replace(config, model=shorter), path)
    longer = dataclasses.replace(config.model, pattern=config.model.pattern + "M")
    with pytest.raises(CheckpointError, match=r"layers\.8\.mixer\.A_log: missing in the checkpoint"):
        check_checkpoint_model(dataclasses.replace(config, model=longer), path)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_that_does_not_fit_the_run_says_so_before_it_joins(start: Any, tmp_path: Path) -> None:
    result, run = start("run", "train.steps=2", "train.final_eval=false", "train.eval_interval=0")
    assert result.returncode == 0, result.stderr
    environment = run.path / "environment.json"
    environment.write_text(environment.read_text().replace('"torch": "', '"torch": "0.'))
    rank = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    # No other rank exists: had this one tried to join, it would wait.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "PRETRAIN_ATTEMPT": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "pretrain.training.entry", run.path],
        env=os.environ | rank | address,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert "2 processes were started, expected launcher.num_processes=1" in ended.stdout
    assert "torch 2" in ended.stdout
    assert "where the run was started" in ended.stdout


@pytest.mark.distributed
@pytest.mark.slow
def test_resume_refuses_another_model_and_leaves_the_run_as_it_is(start: Any, tmp_path: Path) -> None:
    result, run = start("run", "train.steps=2", "train.final_eval=false", "train.eval_interval=0")
    assert result.returncode == 0, result.stderr
    frozen = run.path / "config.yaml"
    frozen.write_text(frozen.read_text().replace("pattern: M-*-", "pattern: M-*"))
    refused = pretrain("resume", run.path, "train.steps=4")
    assert refused.returncode == 2
    assert "layers.3.mixer.out_proj.weight: not in the model" in refused.stderr
    assert not (run.path / "revisions").exists()
    assert not list((run.path / "checkpoints").glob("set_aside*"))
