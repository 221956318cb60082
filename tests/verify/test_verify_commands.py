"""``pretrain verify`` end to end: real runs, a real kill -9, and a fault that it must find."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.command import pretrain

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# An objective whose loss depends on how often this process called it: state that no checkpoint holds.
FORGETFUL = """
from dataclasses import dataclass, replace

from pretrain.objectives.config import NextTokenConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    def build(self):
        return Objective()


class Objective:
    def __init__(self):
        self.calls, self.inner = 0, NextTokenConfig().build()

    def denominator(self, batch):
        return self.inner.denominator(batch)

    def __call__(self, model, batch):
        output = self.inner(model, batch)
        if model.training:
            self.calls += 1
            return replace(output, loss_sum=output.loss_sum * (1 + self.calls / 100))
        return output
"""


def test_a_killed_run_is_found_identical(tiny_overrides: list[str], tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    result = pretrain(
        "verify", "resume", *tiny_overrides, "launcher.num_processes=2", "--keep", keep, "--steps", 8, "--kill-at", 4
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "SIGKILL to 3 processes with step " in result.stdout
    assert "identical: 8 steps on 2 rank(s), 96 tensors (32 master, 32 exp_avg, 32 exp_avg_sq)" in result.stdout
    # The kill was real: the first attempt ended without saying so, and not by its own last step.
    log = (keep / "killed/logs/attempt_0001/rank_00000.log").read_text()
    assert "step 3/8" in log
    assert "finished" not in log
    assert (keep / "killed/trace/attempt_0002/rank_00001.jsonl").is_file()


def test_state_that_no_checkpoint_holds_is_found(tiny_overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/forgetful.py").write_text(FORGETFUL)
    result = pretrain(
        "verify", "resume", *tiny_overrides, f"run.import_paths=[{tmp_path}/outside]",
        "objective={_target_: forgetful.Config}", "--steps", 8, "--kill-at", 4, "--keep", tmp_path / "kept",
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    start = re.search(r"from the checkpoint of step (\d+)", result.stdout)
    assert start is not None, result.stdout + result.stderr
    fault = re.search(r"DIVERGED after the resume.*\n  step (\d+), loss, rank 0: (\S+) != (\S+)", result.stdout)
    assert fault is not None, result.stdout
    assert int(fault[1]) == int(start[1]) + 1
    assert float(fault[2]) > float(fault[3])


def test_layouts_are_compared_in_a_table(tiny_overrides: list[str]) -> None:
    result = pretrain(
        "verify", "layout", *tiny_overrides, "--steps", 3, "--layouts",
        "plain: engine.zero_stage=0",
        "three: launcher.num_processes=3",
        "ZeRO-2 x 2: engine.zero_stage=2 launcher.num_processes=2",
        "other rate: engine.zero_stage=0 optimizer.learning_rate=0.01",
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    rows = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert re.search(r"refused: train.global_batch_size: .*\(found 4\)", rows["three"])
    assert re.search(r"^ZeRO-2 x 2 +2 .* bitwise +equal +(within \S+ \(tolerance 1e-05\)|bitwise)", rows["ZeRO-2 x 2"])
    # The first step's rate changes nothing but the weights after it.
    assert re.search(r" bitwise +equal +DIVERGED at step 2, loss, all ranks: ", rows["other rate"])
