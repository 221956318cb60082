"""A model, an objective and a data source from outside the repository train through the same path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.command import Outcome, pretrain, same_tensors

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PACKAGE = '''
"""Regression of a fixed linear map: nothing of it is text."""
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.map(x)


class Noisy(Net):
    """Draws from torch's generator, and keeps a running statistic of what its rank saw."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_buffer("mean", torch.zeros(inputs))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.map(nn.functional.dropout(x - self.mean, 0.2, self.training))


class Squares:
    """Called with fields straight from the configuration: no config class."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def denominator(self, batch):
        return float(batch["y"].numel())

    def __call__(self, model, batch):
        error = model(batch["x"]) - batch["y"]
        return Loss(self.scale * (error**2).sum(), {"absolute_error": error.detach().abs().sum()})


@dataclass
class Loss:
    loss_sum: torch.Tensor
    metrics: dict


class Points:
    fingerprint = "points-v1"
    num_samples = None
    num_bytes = None

    def __init__(self, seed: int, inputs: int, outputs: int):
        self.seed = seed
        self.truth = np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32)

    def batch(self, indices):
        x = np.stack([
            np.random.default_rng([self.seed, index]).normal(size=self.truth.shape[1]) for index in indices
        ]).astype(np.float32)
        return {"x": x, "y": x @ self.truth.T}

    def close(self):
        pass


@dataclass
class Sources:
    train: Points
    validation: None = None
    tokenizer_path: None = None


def points(seed: int, inputs: int, outputs: int) -> Sources:
    return Sources(Points(seed, inputs, outputs))
'''

EXPERIMENT = """
# @package _global_
defaults:
  - override /tracking: disabled
  - override /model: line
  - override /data: points
  - override /objective: squares
run: {name: foreign, import_paths: [PACKAGES]}
train: {steps: 40, global_batch_size: 8, micro_batch_size: 2, checkpoint_interval: 20, eval_interval: 0}
optimizer: {learning_rate: 0.1, weight_decay: 0.0, schedule: {kind: constant}}
launcher: {num_processes: 2}
"""


@pytest.fixture
def command(tmp_path: Path) -> list[Any]:
    """``pretrain run`` with the package and its configuration files, made on the spot."""
    packages, configs = tmp_path / "packages", tmp_path / "configs"
    for folder in (packages / "lines", *(configs / group for group in ("experiment", "model", "data", "objective"))):
        folder.mkdir(parents=True)
    (packages / "lines/__init__.py").write_text(PACKAGE)
    (configs / "experiment/line.yaml").write_text(EXPERIMENT.replace("PACKAGES", str(packages)).lstrip())
    (configs / "model/line.yaml").write_text("_target_: lines.Net\ninputs: 3\noutputs: 2\n")
    (configs / "data/points.yaml").write_text("_target_: lines.points\nseed: ${run.seed}\ninputs: 3\noutputs: 2\n")
    (configs / "objective/squares.yaml").write_text("_target_: lines.Squares\n")
    return ["run", "--config-dir", configs, "experiment=line"]


def test_a_package_made_on_the_spot_trains_and_resumes(command: list[Any], tmp_path: Path) -> None:
    wrong = pretrain(*command, "model.input=4", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "model.input" in wrong.stderr
    result = pretrain(*command, "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = Outcome(tmp_path / "run")
    losses = run.losses()
    assert losses[40] < 0.01 * losses[1]
    resumed = pretrain("resume", run.path, "train.steps=45", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert run.losses()[45] < losses[1]
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "train"]
    assert steps[-1]["metrics"]["absolute_error"] < 0.1 * steps[0]["metrics"]["absolute_error"]


def test_draws_and_buffers_of_a_foreign_model_continue_bit_for_bit(command: list[Any], tmp_path: Path) -> None:
    noisy = [*command, "model._target_=lines.Noisy", "train.checkpoint_interval=3"]
    whole = pretrain(*noisy, "--run-dir", tmp_path / "whole", "train.steps=6", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    first = pretrain(*noisy, "--run-dir", tmp_path / "parts", "train.steps=3", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = pretrain("resume", tmp_path / "parts", "train.steps=6", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    expected, found = Outcome(tmp_path / "whole"), Outcome(tmp_path / "parts")
    assert expected.losses() == found.losses()
    assert same_tensors(expected.tensors(6), found.tensors(6)) == []
    assert "buffer:mean" in found.tensors(6)
