"""Runs on damaged, changed and growing data, through the command line and real processes."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from support.command import Outcome, pretrain

from data_pipeline.config import TextDataConfig
from data_pipeline.store.manifest import Block, Manifest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VOCABULARY = 300
OVERRIDES = [
    "experiment=tiny",
    f"model.vocab_size={VOCABULARY}",
    "data.sequence_length=32",
    "data.num_lanes=4",
    "launcher.num_processes=2",
    "train.micro_batch_size=2",
    "train.eval_interval=0",
    "train.checkpoint_interval=2",
    "train.async_checkpoints=false",
]
STDLIB = Path(sysconfig.get_path("stdlib"))


def prepare(out: Path, module: str, *more: str) -> None:
    """Small documents, five lines of a module of the standard library each."""
    lines = (STDLIB / module).read_text().splitlines()
    texts = ["\n".join(lines[at : at + 5]) for at in range(0, len(lines), 5)]
    source = out.with_name(f"{out.name}-{Path(module).stem}.jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))
    result = pretrain("data", "prepare", "text", source, out, "--workers", "1", *more)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bad-data") / "json"
    prepare(
        out, "json/decoder.py", "--vocab-size", str(VOCABULARY), "--block-tokens", "150", "--validation-fraction", "0.2"
    )
    TextDataConfig(path=str(out), sequence_length=32, num_lanes=4).build(1234)  # leaves its plan there
    return out


def flip(folder: Path, block: Block) -> None:
    """Flip one bit of the block's tokens."""
    with open(folder / block.shard, "r+b") as stream:
        stream.seek(block.members["tok.npy"]["offset"] + 200)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))


def rank_logs(run: Path, attempt: int = 1) -> list[str]:
    return [(run / "logs" / f"attempt_{attempt:04d}" / f"rank_{rank:05d}.log").read_text() for rank in range(2)]


def damage(folder: Path) -> str:
    """Flip a bit of the first block that rank 1 reads first, after the first two steps; returns its member."""
    source = TextDataConfig(path=str(folder), sequence_length=32, num_lanes=4).build(1234).train
    seen: set[str] = set()
    for index in range(32):
        fresh = {piece["member"] for piece in source.provenance(index)} - seen
        if index >= 8 and index % 4 >= 2 and fresh:
            member = min(fresh)
            break
        seen |= fresh
    else:
        pytest.fail("no block is first read by rank 1")
    block = next(b for b in Manifest.load(folder).blocks("train") if f"{b.key}.tok.npy" == member)
    flip(folder, block)
    return member


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
