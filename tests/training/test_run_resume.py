"""The main job end to end, through the command line and real processes: train, kill, resume, extend, refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.command import Outcome, pretrain, same_tensors

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# An objective from outside the repository that hits its own run at a chosen step, once: the marker file tells a second
# attempt (and the undisturbed twin) apart. Two micro-batches of one step call it twice.
SABOTAGE = '''
"""The next-token objective, with an accident at a chosen call."""
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from pretrain.objectives.config import NextTokenConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    marker: str
    call: int
    rank: int
    victim: str

    def build(self):
        return Objective(self)


class Objective:
    def __init__(self, config):
        self.config, self.calls, self.inner = config, 0, NextTokenConfig().build()

    def denominator(self, batch):
        return self.inner.denominator(batch)

    def __call__(self, model, batch):
        if model.training:
            self.calls += 1
            mine = int(os.environ["SLURM_PROCID"]) == self.config.rank
            if mine and self.calls == self.config.call and not Path(self.config.marker).exists():
                Path(self.config.marker).touch()
                if self.config.victim == "rank":
                    os.kill(os.getpid(), signal.SIGKILL)
                # Go on only when the launcher's signal has come back to this rank.
                arrived, wakeup = os.pipe()
                os.set_blocking(wakeup, False)
                signal.set_wakeup_fd(wakeup)
                os.kill(os.getppid(), signal.SIGTERM)
                os.read(arrived, 1)
        return self.inner(model, batch)
'''


def sabotage(folder: Path, *, call: int, rank: int, victim: str, armed: bool) -> list[str]:
    """Overrides that put the objective above into a run (with ``armed`` false nothing ever happens)."""
    package = folder / "outside"
    package.mkdir(exist_ok=True)
    (package / "sabotage.py").write_text(SABOTAGE)
    marker = folder / f"marker-{victim}"
    if not armed:
        marker.touch()
    return [
        f"run.import_paths=[{package}]",
        f"objective={{_target_: sabotage.Config, marker: {marker}, call: {call}, rank: {rank}, victim: {victim}}}",
        "launcher.num_processes=2",
        "train.micro_batch_size=1",
        "train.checkpoint_interval=3",
        # A callback that rank 0 alone has.
        "train.sample_interval=2",
        "train.sample_prompts=[def]",
        "train.sample_tokens=2",
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_resumes_bit_for_bit(start: Any, tmp_path: Path, precision: str) -> None:
    # Each rank sees two micro-batches a step: call 10 is in the fifth step, two steps after the checkpoint.
    # Synchronous, so that the checkpoint is there for certain when the kill comes.
    overrides = [*sabotage(tmp_path, call=10, rank=1, victim="rank", armed=True), "train.async_checkpoints=false"]
    killed, run = start("killed", *overrides, f"train.precision={precision}")
    assert killed.returncode == 128 + 9, killed.stderr
    assert "rank 1 ended with code 137" in killed.stderr
    assert max(run.losses()) == 4
    resumed = pretrain("resume", run.path)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after step 3" in resumed.stdout
    undisturbed, twin = start("undisturbed", *overrides, f"train.precision={precision}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert list(run.losses()) == list(range(1, 9))
    assert run.losses() == twin.losses()
    assert run.validation() == twin.validation()
    assert same_tensors(run.tensors(8), twin.tensors(8)) == []
    # The record keeps both attempts; the steps that were rolled back are marked by their attempt.
    attempts = {json.loads(line)["attempt"] for line in (run.path / "metrics.jsonl").read_text().splitlines()}
    assert attempts == {1, 2}


def test_a_stop_signal_saves_and_exits_resumable(start: Any, tmp_path: Path) -> None:
    overrides = sabotage(tmp_path, call=9, rank=0, victim="launcher", armed=True)
    stopped, run = start("stopped", *overrides)
    assert stopped.returncode == 85, stopped.stderr
    assert f"resume {run.path.name}" in stopped.stdout
    step = max(run.losses())
    assert step == 5  # the step in which the signal came was finished
    assert (run.path / "checkpoints/latest").read_text().strip() == f"step_{step:08d}"
    # The rest is trained by one process with another micro-batch and ZeRO stage: another layout, the same run.
    resumed = pretrain(
        "resume", run.path, "launcher.num_processes=1", "train.micro_batch_size=2", "engine.zero_stage=0"
    )
    assert resumed.returncode == 0, resumed.stderr
    undisturbed, twin = start("undisturbed", *overrides)
    assert undisturbed.returncode == 0, undisturbed.stderr
    first = {s: loss for s, loss in run.losses().items() if s <= step}
    assert first == {s: loss for s, loss in twin.losses().items() if s <= step}
    assert list(run.losses().values()) == pytest.approx(list(twin.losses().values()), rel=1e-5)


@pytest.fixture
def finished(start: Any) -> Outcome:
    result, run = start("finished")
    assert result.returncode == 0, result.stderr
    return run


def test_a_finished_run_extends_by_a_numbered_revision(finished: Outcome) -> None:
    again = pretrain("resume", finished.path)
    assert again.returncode == 0
    assert "Nothing to do" in again.stdout
    refused = pretrain("resume", finished.path, "train.steps=12", "optimizer.learning_rate=1", "model.width=64")
    assert refused.returncode == 2
    assert "optimizer.learning_rate" in refused.stderr
    assert "model.width" in refused.stderr
    assert not (finished.path / "revisions").exists()

    extended = pretrain("resume", finished.path, "train.steps=10")
    assert extended.returncode == 0, extended.stderr
    assert "revision 1" in extended.stdout
    assert "train.steps: 8 -> 10" in (finished.path / "revisions/0001.yaml").read_text()
    records = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
    rates = {r["step"]: r["metrics"]["learning_rate"] for r in records if r["event"] == "train"}
    # The schedule still ends at step 8: the added steps keep its final value.
    assert rates[9] == rates[10] == pytest.approx(rates[8])
    assert len(finished.losses()) == 10


def test_a_damaged_checkpoint_is_named_and_the_previous_one_works(finished: Outcome) -> None:
    folder = finished.path / "checkpoints"
    file = folder / "step_00000008/rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    refused = pretrain("resume", finished.path, "train.steps=10")
    assert refused.returncode == 4
    assert "rank_00000.safetensors: hash" in refused.stderr
    assert "--checkpoint step_00000004" in refused.stderr
    before = finished.losses()
    listed = pretrain("checkpoint", "verify", finished.path)
    assert listed.returncode == 4
    assert "step_00000008  DAMAGED" in listed.stdout
    # The refused attempt changed nothing, and the way out that it offered leads on.
    resumed = pretrain("resume", finished.path, "--checkpoint", "step_00000004")
    assert resumed.returncode == 0, resumed.stderr
    assert finished.losses() == before


def test_a_run_directory_with_another_configuration_is_refused(start: Any, finished: Outcome) -> None:
    before = (finished.path / "config.yaml").read_text()
    refused, _ = start("finished", "train.global_batch_size=8")
    assert refused.returncode == 3
    assert "train.global_batch_size" in refused.stderr
    assert (finished.path / "config.yaml").read_text() == before


def test_wrong_values_are_reported_together_and_nothing_starts(start: Any) -> None:
    refused, run = start(
        "wrong", "model.num_heads=5", "train.global_batch_size=7", "train.stepz=9", "optimizer.learning_rate=high"
    )
    assert refused.returncode == 2
    for path in ("model.num_heads", "train.global_batch_size", "train.stepz", "optimizer.learning_rate"):
        assert path in refused.stderr
    assert not run.path.exists()


def test_generation_uses_the_checkpoint_without_an_engine(finished: Outcome) -> None:
    first = pretrain("generate", finished.path, "--prompt", "def ", "--tokens", "12")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ")
    assert pretrain("generate", finished.path, "--prompt", "def ", "--tokens", "12").stdout == first.stdout
    missing = pretrain("generate", finished.path, "--checkpoint", "5")
    assert missing.returncode == 2
    assert "existing: step_00000004, step_00000008" in missing.stderr


def test_a_failed_start_and_a_lost_report_cost_nothing(finished: Outcome) -> None:
    before = finished.losses()
    # As if the run had been killed after its last checkpoint, before validation and report.
    (finished.path / "artifacts/summary.json").unlink()
    frozen = (finished.path / "data.json").read_text()
    (finished.path / "data.json").write_text('{"fingerprint": "other"}')
    refused = pretrain("resume", finished.path)
    assert refused.returncode == 3
    assert "data with fingerprint other" in refused.stderr
    assert "Traceback" not in refused.stderr
    (finished.path / "data.json").write_text(frozen)
    assert finished.losses() == before
    again = pretrain("resume", finished.path)
    assert again.returncode == 0, again.stderr
    assert finished.losses() == before
    assert (finished.path / "artifacts/summary.json").exists()
    events = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
    assert any(e["event"] == "failure" and "data with fingerprint other" in e["message"] for e in events)


def test_every_rank_logs_where_it_runs_and_rank_0_what_happens(finished: Outcome) -> None:
    log = (finished.path / "logs/attempt_0001/rank_00000.log").read_text()
    assert "rank 0 of 1 on " in log
    for text in ("step 1/8  loss", "step 8/8  checkpoint saved", "validation bits per byte", "finished"):
        assert text in log


def test_the_report_sets_the_model_beside_simple_baselines(finished: Outcome) -> None:
    report = pretrain("report", finished.path)
    assert report.returncode == 0, report.stderr
    for text in ("bits per byte, this model", "bits per byte, token bigram model", "bits per byte, xz -9e", "resume"):
        assert text in report.stdout
    summary = json.loads((finished.path / "artifacts/summary.json").read_text())
    losses = finished.losses()
    assert (summary["loss_start"], summary["steps"]) == (losses[1], 8)
    # Untrained, the model is about uniform over the vocabulary, and far behind a bigram model.
    assert summary["validation_bits_per_byte"] > summary["baselines"]["bigram_bits_per_byte"] > 0
    assert (finished.path / "artifacts/loss_curve.png").stat().st_size > 10_000
