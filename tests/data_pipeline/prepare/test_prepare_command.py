"""``pretrain data prepare text`` as a command: shares of the work, exit codes, what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from prepare_helpers import contents, random_texts, write_jsonl

from data_pipeline.cli import add_arguments, run
from data_pipeline.commands.prepare_text import task_of
from data_pipeline.commands.text_progress import describe
from data_pipeline.prepare.metering import Counts, Status
from data_pipeline.prepare.workspace import Task

OPTIONS = ("--vocab-size", 300, "--validation-fraction", 0.15, "--workers", 1, "--piece-bytes", 2_000)


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def call(*arguments: object) -> int:
    return run(parse(*arguments))


def test_several_sources_and_every_reason_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", random_texts(30))
    (tmp_path / "b.jsonl").write_text('{"text": 1}\nx\n')
    out = tmp_path / "out"
    assert call("prepare", "text", tmp_path / "a.jsonl", tmp_path / "b.jsonl", out, *OPTIONS) == 0
    printed = capsys.readouterr()
    assert "2 documents dropped (1 not JSON, 1 text is not a string):" in printed.out
    assert f"{tmp_path / 'b.jsonl'}: line 2: not JSON" in printed.out
    assert "tokeniser " in printed.out
    assert "reading documents: 100 %" in printed.err
    assert "M tokens/s" in printed.err
    assert "2 dropped (1 not JSON, 1 text is not a string)" in printed.err
    write_jsonl(tmp_path / "c.jsonl", random_texts(9, seed=2))
    assert call("prepare", "text", tmp_path / "c.jsonl", out, "--append", "--workers", 1) == 0
    assert "wrote" in capsys.readouterr().out
    assert call("prepare", "text", tmp_path / "c.jsonl", out, "--append", "--workers", 1) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert call("verify", out) == 0


def test_array_tasks_end_with_75_until_all_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", random_texts(60))
    codes = []
    for _ in range(3):
        for number in (3, 5):  # sbatch --array=3-5:2
            for name, value in (("ID", number), ("MIN", 3), ("STEP", 2), ("COUNT", 2)):
                monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
            codes.append(call("prepare", "text", tmp_path / "a.jsonl", tmp_path / "out", *OPTIONS, "--array"))
    assert codes == [75, 75, 75, 0, 0, 0]
    errors = capsys.readouterr().err
    assert "unfinished: reading documents:" in errors
    assert "of task 1 (of 2). What to do: when those tasks have ended, run all tasks again" in errors
    assert call("prepare", "text", tmp_path / "a.jsonl", tmp_path / "alone", *OPTIONS) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_finish_alone_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", random_texts(60))
    assert call("prepare", "text", tmp_path / "a.jsonl", tmp_path / "out", *OPTIONS, "--finish") == 75
    assert "units are not done. What to do: run the command without --finish" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((), {}, None),
        (("--task", 1, "--tasks", 4), {}, Task(1, 4)),
        (("--array",), {"ID": "12", "MIN": "10", "STEP": "1", "COUNT": "6"}, Task(2, 6)),
    ],
)
def test_task_of(arguments: tuple[object, ...], environment: dict[str, str], expected: Task | None) -> None:
    args = parse("prepare", "text", "in", "out", *arguments)
    assert task_of(args, {f"SLURM_ARRAY_TASK_{name}": value for name, value in environment.items()}) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", 1), "go together"),
        (("--array",), "SLURM_ARRAY_TASK_ID.*sbatch --array"),
        (("--array", "--task", 1, "--tasks", 2), "exclude each other"),
        (("--task", 2, "--tasks", 2), "numbered from 0 to 1"),
        (("--task", 0, "--tasks", 2, "--force"), "undo the work of the others"),
    ],
)
def test_wrong_shares_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    import re

    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert call("prepare", "text", tmp_path / "a.jsonl", tmp_path / "out", *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_progress_tells_rates_time_left_and_drops() -> None:
    counts = Counts(read=0, documents=5_000, bytes=20_000_000, tokens=5_000_000)
    counts.dropped.update({"empty": 2, "not JSON": 1})
    status = Status("tokenising", 3_000_000_000, 6_000_000_000, "bytes", counts, 10.0, earlier=2_900_000_000)
    assert describe(status) == (
        "50 % of 6.0 GB, 500 documents/s, 2.0 MB/s, 0.50 M tokens/s, ETA 5:00, 3 dropped (2 empty, 1 not JSON)"
    )
    assert "ETA" not in describe(Status("tokenising", 1, 1, "shards", Counts(), 1.0))
