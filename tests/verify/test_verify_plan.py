"""What verification decides before anything runs: where to kill, which overrides hold, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command import pretrain

from pretrain.verify.compare import Tolerance
from pretrain.verify.experiment import Experiment
from pretrain.verify.layout import DEFAULT_LAYOUTS, Layout
from pretrain.verify.resume import ResumePlan


@pytest.mark.parametrize("kill_at", range(3, 40))
def test_the_kill_comes_between_checkpoints_and_after_one(kill_at: int) -> None:
    plan = ResumePlan.make(steps=50, kill_at=kill_at, then=[])
    assert 0 < kill_at // plan.interval * plan.interval < kill_at


def test_a_kill_needs_a_step_on_either_side() -> None:
    assert ResumePlan.make(10, None, []).kill_at == 6
    for steps, kill_at in ((10, 10), (10, 1), (2, None)):
        with pytest.raises(ValueError, match="--kill-at: found"):
            ResumePlan.make(steps, kill_at, [])


def test_later_overrides_replace_earlier_ones_and_the_trace_stays_on() -> None:
    experiment = Experiment(("experiment=tiny", "train.eval_interval=2", "train.trace=false", "engine=deepspeed"))
    overrides = experiment.with_overrides(["engine=megatron"]).all_overrides
    assert "train.eval_interval=2" in overrides
    assert "tracking.enabled=false" in overrides
    assert [o for o in overrides if o.startswith(("engine=", "train.trace="))] == [
        "engine=megatron",
        "train.trace=true",
    ]


def test_tolerances_follow_the_precision_unless_given() -> None:
    overrides = ("experiment=tiny", "data.path=nowhere")

    class Config:
        class train:  # noqa: N801
            precision = "fp32"

    assert Experiment(overrides).tolerance(Config()) == Tolerance(1e-5, 1e-4)  # type: ignore[arg-type]
    given = Experiment(overrides, loss_tolerance=0.0)
    assert given.tolerance(Config()) == Tolerance(0.0, 1e-4)  # type: ignore[arg-type]


def test_layouts_have_a_name_and_overrides() -> None:
    assert Layout.parse("ZeRO 2: engine.zero_stage=2 'run.name=a b'") == Layout(
        "ZeRO 2", ("engine.zero_stage=2", "run.name=a b")
    )
    for text in ("engine.zero_stage=2", ": engine.zero_stage=2", "run.root=C:x"):
        with pytest.raises(ValueError, match=r"expected 'NAME: overrides'"):
            Layout.parse(text)
    assert len({layout.name for layout in DEFAULT_LAYOUTS}) == len(DEFAULT_LAYOUTS)


def test_bad_input_ends_before_anything_runs(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    refused = pretrain("verify", "resume", "experiment=tinny", "--keep", keep, cwd=tmp_path)
    assert refused.returncode == 2
    assert "tiny" in refused.stderr
    assert not any(keep.iterdir())
    (keep / "something").touch()
    full = pretrain("verify", "layout", "experiment=tiny", "--keep", keep, cwd=tmp_path)
    assert full.returncode == 2
    assert "which is not empty" in full.stderr
