"""``pretrain runs`` and ``status`` as their users meet them: on a terminal, in a pipe, as JSON."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from support.watched_run import WatchedRun

from pretrain.cli import main
from pretrain.commands.watching import short_count, short_duration, short_nodes

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Runs in four states; the running one is held by this process, has 24 ranks, and one of them stands out."""
    root = tmp_path / "runs"
    done = WatchedRun(root / "tiny-20260101-000000", launcher="local")
    done.started(1)
    done.trained(1, 0, 100)
    done.ended(1, "finished")
    broken = WatchedRun(root / "ablation-lr4-20260102-091501")
    broken.started(1)
    broken.trained(1, 0, 12)
    broken.ended(1, "device_memory", rank=3, node="node2", reason="rank 3 on node2 ended with code 7: out of memory")
    busy = WatchedRun(root / "hybrid-3b-with-a-long-name-20260103-081500", steps=120_000)
    busy.started(1, nodes=tuple(f"gpu{i:02d}" for i in range(12)))
    busy.ended(1, "node_failure", "exclude", node="gpu01", rank=9)
    busy.started(2, nodes=("gpu00", "gpu02", "gpu03"))
    busy.trained(2, 10, 97)
    busy.held(2)
    for rank in range(24):
        busy.beat(2, rank, step=98, phase="data" if rank == 13 else "all-reduce", node=f"gpu{rank // 8:02d}")
    WatchedRun(root / "new-20260104-000000")
    return root


def on_terminal(columns: int, *arguments: object) -> str:
    """What a command shows on a terminal so wide."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "pretrain.cli", *map(str, arguments)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    output = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        output += data
    os.close(master)
    assert process.wait(60) == 0, output.decode()
    return output.decode().replace("\r\n", "\n")


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# ---- runs and status ---------------------------------------------------------------------------------------------


def test_runs_in_a_pipe_are_aligned_lines_that_lack_nothing(root: Path, capsys: Capture) -> None:
    assert main(["runs", str(root)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["RUN", "STATE", "STEP", "LOSS", "TOK/S", "ETA", "RESTARTS", "LAST", "EXIT", "IDLE"]
    # Active runs first.
    assert rows[0].split()[:3] == ["hybrid-3b-with-a-long-name-20260103-081500", "running", "98/120000"]
    assert rows[0].split()[6:8] == ["1", "node_failure"]
    cells = {row.split()[0]: row.split() for row in rows}
    assert cells["tiny-20260101-000000"][1:3] == ["finished", "100/100"]
    assert cells["ablation-lr4-20260102-091501"][1] == "failed"
    assert "device_memory" in cells["ablation-lr4-20260102-091501"]
    assert cells["new-20260104-000000"][1] == "created"
    assert len({row.index(cells[row.split()[0]][1]) for row in rows}) == 1, "states stand below each other"
    assert "\x1b" not in header


def test_runs_can_be_narrowed(root: Path, capsys: Capture) -> None:
    assert main(["runs", str(root), "--active"]) == 0
    assert [row.split()[1] for row in capsys.readouterr().out.splitlines()[1:]] == ["running"]
    assert main(["runs", str(root), "-n", "2"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert "2 older runs are not shown" in captured.err
    assert main(["runs", str(root / "elsewhere")]) == 3
    assert "no such folder" in capsys.readouterr().err


def test_runs_and_status_as_json(root: Path, capsys: Capture) -> None:
    assert main(["runs", str(root), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in rows} == {"running", "finished", "failed", "created"}
    assert main(["status", "hybrid", "--root", str(root), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["restarts"], status["attempts"][0]["node"]) == ("running", 1, "gpu01")
    assert len(status["details"]["beats"]) == 24


@pytest.mark.parametrize("columns", [100, 80])
def test_tables_fit_the_terminal_and_lose_no_name(root: Path, columns: int) -> None:
    shown = on_terminal(columns, "runs", root)
    assert "\x1b[" in shown, "a terminal gets colours"
    text = without_colours(shown)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= columns
    folded = "".join(line[:40].split(" ")[0] for line in text.splitlines())
    assert "hybrid-3b-with-a-long-name-20260103-081500" in folded
    for cell in ("node_failure", "device_memory", "98/120000"):
        assert cell in text, f"{cell} is cut"
    if columns == 100:
        text = without_colours(on_terminal(columns, "status", "hybrid", "--root", root))
        # Commands at the end are for copying, and stay on one line.
        assert max(len(line.rstrip()) for line in text.splitlines()[:-2]) <= columns
        assert "gpu[00-11]" in text


def test_status_names_who_stands_out_and_what_to_do(root: Path, capsys: Capture) -> None:
    assert main(["status", "hybrid", "--root", str(root)]) == 0
    page = capsys.readouterr().out
    assert re.search(r"progress +step 98/120000 \(0.1%\), 2d18h to go", page)
    assert "24 ranks: 23 in all-reduce after step 98, 1 in data after step 98" in page
    ranks = [line.split() for line in page.splitlines() if re.match(r" +\d+  gpu\d\d ", line)]
    assert [(row[0], row[3]) for row in ranks] == [("13", "data")]
    assert re.search(r"1  .*gpu\[00-11\] .*node_failure  rank 9 gpu01  exclude", page)
    assert "cancel " in page.splitlines()[-1]
    assert main(["status", "hybrid", "--root", str(root), "--ranks"]) == 0
    assert len(re.findall(r"^ +\d+  gpu\d\d ", capsys.readouterr().out, re.MULTILINE)) == 24
    assert main(["status", "abl", "--root", str(root)]) == 0
    page = capsys.readouterr().out
    assert re.search(r"state +failed: rank 3 on node2 ended with code 7: out of memory", page)
    assert re.search(r"logs .*ablation\S+ --rank 3", page)
    assert "resume " in page.splitlines()[-1]


def test_short_forms() -> None:
    assert [short_duration(s) for s in (None, 59.4, 60, 3599.4, 3600, 86399, 90000)] == [
        "-", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d01h",
    ]  # fmt: skip
    assert [short_count(v) for v in (None, 0.5, 999, 1000, 123456, 2.5e9)] == [
        "-",
        "0.5",
        "999",
        "1.0k",
        "123k",
        "2.5G",
    ]
    assert short_nodes(["gpu01", "gpu02", "gpu03", "gpu07", "login"]) == "gpu[01-03,07],login"
    assert short_nodes(["n9", "n10"]) == "n9,n10"
    assert short_nodes(["node3"]) == "node3"
