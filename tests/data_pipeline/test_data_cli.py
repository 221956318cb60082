"""The verbs of ``pretrain data``: exit codes and what they print."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_pipeline.cli import add_arguments, run


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


OPTIONS = ("--vocab-size", 300, "--validation-fraction", 0.15, "--workers", 1)


def test_prepare_inspect_verify(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call("prepare", "text", corpus, out, "--pattern", "part0/*.txt", *OPTIONS) == 0
    printed = capsys.readouterr()
    assert "wrote" in printed.out
    assert "0 documents dropped" in printed.out
    assert "tokenising: 100 %" in printed.err
    assert call("prepare", "text", corpus, out, "--pattern", "part0/*.txt", *OPTIONS) == 0
    assert "already holds exactly this dataset" in capsys.readouterr().out
    assert call("inspect", out) == 0
    assert "train-000000.tar" in capsys.readouterr().out
    assert call("verify", out) == 0
    assert "all sound" in capsys.readouterr().out
    os.truncate(out / "train-000000.tar", 100)
    assert call("verify", out) == 2
    printed = capsys.readouterr()
    assert "train-000000.tar" in printed.out
    assert re.search(r"^\d+ shards checked: 1 fault$", printed.out, re.MULTILINE)


def test_one_thing_is_not_told_as_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        member = tarfile.TarInfo("0.txt")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    assert call("index", folder, "--workers", 1) == 0
    assert call("verify", folder) == 0
    assert "1 shard checked: all sound" in capsys.readouterr().out
    os.truncate(folder / "a.tar", 100)
    assert call("verify", folder) == 2
    assert "1 shard checked: 1 fault\n" in capsys.readouterr().out
    assert call("index", folder, "--workers", 1, "--force") == 2
    assert "error: 1 fault; nothing was written" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a").touch()
    assert call("prepare", "text", tmp_path / "empty", tmp_path / "out") == 2
    assert "none of the documents in 1 file of" in capsys.readouterr().err


def test_user_errors_exit_2(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prepare", "text", tmp_path / "none", tmp_path / "out") == 2
    assert call("prepare", "text", corpus, tmp_path / "out", "--vocab-size", 3) == 2
    assert call("prepare", "text", corpus, tmp_path / "out", "--validation-fraction", 1) == 2
    assert call("inspect", tmp_path) == 2
    errors = capsys.readouterr().err
    assert "does not exist" in errors
    assert "below 258" in errors
    assert "pretrain data prepare" in errors
    assert list(tmp_path.iterdir()) == []


def test_importing_the_verbs_and_the_config_is_light() -> None:
    script = (
        "import sys, data_pipeline.cli, data_pipeline.config\n"
        "heavy = {'numpy', 'torch', 'tokenizers', 'rich', 'webdataset'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0


def test_reading_needs_no_torch(dataset: Path) -> None:
    script = (
        "import sys\n"
        "from data_pipeline.config import TextDataConfig\n"
        f"TextDataConfig(path={str(dataset)!r}, sequence_length=16).build(seed=0).train.batch([0])\n"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0
