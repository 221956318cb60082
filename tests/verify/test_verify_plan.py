"""What verification decides before anything runs: where to kill, which overrides hold, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.command import pretrain

from launchers.run_dir import RunDir
from pretrain.verify import layout as verify_layout_module
from pretrain.verify.compare import Tolerance
from pretrain.verify.experiment import Experiment
from pretrain.verify.layout import DEFAULT_LAYOUTS, Layout, verify_layout
from pretrain.verify.resume import ResumePlan
from pretrain.verify.runs import RunFailedError
from pretrain.verify.traces import trace_file


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


def finish_at_once(title: str, log: Path, arguments: Sequence[str | Path]) -> float:
    """In place of a run: its trace, the same for each layout; at stage 2 a rank's refusal."""
    log.write_text("this engine cannot\n")
    if "engine.zero_stage=2" in arguments:
        raise RunFailedError(title, 2, log)
    folder = RunDir(Path(arguments[2])).trace_path(1)
    folder.mkdir(parents=True)
    common = {"rank": 0, "leader": True, "sample_ids": [0], "rng": "0", "loss": 1.0, "grad_norm": 1.0}
    moments = [{"event": event, "step": step} for step, event in enumerate(("start", "step", "step", "step"))]
    lines = [json.dumps(moment | common | {"scalars": {}, "state": {"master:a": "1"}}) for moment in moments]
    trace_file(folder, 0).write_text("\n".join([*lines, ""]))
    return 0.0


PLAIN = "plain: engine.zero_stage=0"
THREE_PROCESSES = "refused by the configuration: launcher.num_processes=3"
STAGE_2 = "refused by the run: engine.zero_stage=2"


@pytest.mark.parametrize(
    ("others", "must_run", "holds"),
    [
        (["same: engine.zero_stage=1"], True, True),
        (["same: engine.zero_stage=1", THREE_PROCESSES], True, False),
        (["same: engine.zero_stage=1", STAGE_2], True, False),
        (["same: engine.zero_stage=1", THREE_PROCESSES, STAGE_2], False, True),
        # Nothing is left to compare.
        ([THREE_PROCESSES, STAGE_2], False, False),
    ],
)
def test_a_refused_layout_is_no_proof(
    tiny_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    others: list[str],
    must_run: bool,
    holds: bool,
) -> None:
    monkeypatch.setattr(verify_layout_module, "finish", finish_at_once)
    layouts = [Layout.parse(text) for text in (PLAIN, *others)]
    lines: list[str] = []
    found = verify_layout(Experiment(tuple(tiny_overrides)), layouts, 3, tmp_path, lines.append, must_run=must_run)
    assert found == holds, lines
    table = "\n".join(lines)
    assert table.count(" refused:") == sum(text in (THREE_PROCESSES, STAGE_2) for text in others)
    assert ("nothing was compared" in table) == (len(others) == table.count(" refused:"))


def test_one_layout_is_nothing_to_compare(tmp_path: Path) -> None:
    alone = pretrain("verify", "layout", "experiment=tiny", "--layouts", PLAIN, cwd=tmp_path)
    assert alone.returncode == 2
    assert "--layouts: found only 'plain', expected at least two" in alone.stderr


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
