"""Runs on damaged, changed and growing data, through the command line and real processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import damaged_text
from support.command import Outcome, pretrain
from support.damaged_text import damage, flip, prepare, prepare_blocks

from data_pipeline.store.manifest import Manifest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OVERRIDES = [*damaged_text.OVERRIDES, "launcher.num_processes=2"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_blocks(tmp_path_factory.mktemp("bad-data") / "json")


def rank_logs(run: Path, attempt: int = 1) -> list[str]:
    return [(run / "logs" / f"attempt_{attempt:04d}" / f"rank_{rank:05d}.log").read_text() for rank in range(2)]


def records(run: Path, event: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["event"] == event]


def test_damage_on_one_rank_stops_all_alike_and_may_then_be_substituted(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "data"))
    member = damage(folder)
    run = tmp_path / "run"
    stopped = pretrain("run", "--run-dir", run, *OVERRIDES, f"data.path={folder}")
    assert stopped.returncode == 6, stopped.stderr
    logs = rank_logs(run)
    told = {line for log in logs for line in log.splitlines() if member in line}
    assert all(member in log for log in logs)
    assert len({line[line.index("train-") :] for line in told}) == 1  # the same words on both
    assert "byte" in next(iter(told))
    assert "What to do" in next(iter(told))

    again = pretrain("resume", run, "data.on_damage=substitute")
    assert again.returncode == 0, again.stderr
    assert max(Outcome(run).losses()) == 8
    (entry,) = records(run, "quarantine")
    assert entry["member"] == member
    total = records(run, "train")[-1]["metrics"]["substituted_rows"]
    assert 0 < total < 20
    assert [path.name for path in sorted((run / "quarantine").iterdir())]

    # The same from the start, and in two goes: one order, one sum.
    straight = tmp_path / "straight"
    assert (
        pretrain(
            "run", "--run-dir", straight, *OVERRIDES, f"data.path={folder}", "data.on_damage=substitute"
        ).returncode
        == 0
    )
    assert Outcome(straight).losses() == Outcome(run).losses()
    assert records(straight, "train")[-1]["metrics"]["substituted_rows"] == total

    bounded = tmp_path / "bounded"
    spent = pretrain(
        "run", "--run-dir", bounded, *OVERRIDES, f"data.path={folder}", "data.on_damage=substitute",
        "data.damage_budget=0",
    )  # fmt: skip
    assert spent.returncode == 6
    assert "data.damage_budget is 0" in spent.stderr + (bounded / "logs/attempt_0001/rank_00000.log").read_text()


def test_damage_in_validation_stops_all_alike_or_is_substituted(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "data"))
    block = Manifest.load(folder).blocks("validation")[-1]
    flip(folder, block)
    overrides = [*OVERRIDES, "train.steps=2", "train.eval_interval=1", "train.final_eval=true", f"data.path={folder}"]
    run = tmp_path / "run"
    stopped = pretrain("run", "--run-dir", run, *overrides)
    assert stopped.returncode == 6, stopped.stderr
    assert all(f"{block.key}.tok.npy" in log for log in rank_logs(run))
    again = pretrain("resume", run, "data.on_damage=substitute")
    assert again.returncode == 0, again.stderr
    assert max(Outcome(run).validation()) == 2


def test_changed_data_are_refused_with_the_first_shard_and_appended_data_wait(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "data"))
    run = tmp_path / "run"
    first = pretrain("run", "--run-dir", run, *OVERRIDES, f"data.path={folder}", "train.steps=4")
    assert first.returncode == 0, first.stderr
    frozen = Manifest.load(folder).fingerprint
    assert f"edition: {frozen}" in (run / "config.yaml").read_text()

    prepare(folder, "json/encoder.py", "--append")
    new = Manifest.load(folder).fingerprint
    unaware = pretrain("resume", run, "train.steps=6", "data.fetch.deadline_s=100")
    assert unaware.returncode == 0, unaware.stderr
    past = pretrain("resume", run, "train.steps=8", f"data.appended=[{{from_sample: 8, edition: {new}}}]")
    assert past.returncode == 2
    assert "taken effect" in past.stderr
    assert [path.name for path in (run / "revisions").iterdir()] == ["0001.yaml"]  # nothing is written down
    joined = pretrain("resume", run, "train.steps=8", f"data.appended=[{{from_sample: 24, edition: {new}}}]")
    assert joined.returncode == 0, joined.stderr
    assert max(Outcome(run).losses()) == 8

    other = tmp_path / "other"
    prepare(other, "json/encoder.py", "--tokenizer", str(folder / "tokenizer.json"), "--block-tokens", "150")
    moved = pretrain("resume", run, "train.steps=12", f"data.path={other}")
    assert moved.returncode != 0
    logs = "".join(path.read_text() for path in (run / "logs").glob("attempt_*/rank_00000.log"))
    assert "train-000000.tar" in moved.stderr + logs
