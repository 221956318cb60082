"""Run directories with a record to track, and one embedded MLflow store for the whole session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.mlflow_server import server
from support.records import write_steps
from support.tcp_proxy import free_port


def _write_run(path: Path, num_steps: int = 5, **tracking: object) -> Path:
    """A run directory as a launcher and a rank leave it, without its end."""
    path.mkdir(parents=True)
    tree = {"run": {"name": "demo"}, "train": {"steps": num_steps}, "tracking": tracking}
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    git = {"revision": "0123abc", "dirty": True}
    (path / "git.json").write_text(json.dumps(git))
    (path / "git.diff").write_text("diff --git a/x b/x\n")
    (path / "environment.json").write_text(json.dumps({"host": "node1", "versions": {"torch": "2.9"}}))
    (path / "artifacts").mkdir()
    (path / "artifacts" / "samples.txt").write_text("once upon a time\n")
    write_steps(path, 1, 0, num_steps)
    return path


@pytest.fixture
def write_run():
    return _write_run


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an embedded store; its tables are made once, by the first test that writes to it."""
    return tmp_path_factory.mktemp("mlruns")


@pytest.fixture(scope="session")
def server_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a real MLflow server that all tests of a session share."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with server(folder, port):
        yield port
