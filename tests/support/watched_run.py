"""Run directories as launchers and ranks leave them, written by hand: for those who read them."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launchers import lease
from launchers.lease import Holder
from launchers.lifecycle import journal
from launchers.run_dir import RunDir
from pretrain.tracking.metrics_log import MetricsLog


class WatchedRun:
    """A run directory at ``path`` whose records a test writes one by one."""

    def __init__(self, path: Path, *, steps: int = 100, launcher: str = "slurm", processes: int = 4) -> None:
        tree = {
            "run": {"name": path.name},
            "train": {"steps": steps},
            "launcher": {"name": launcher, "num_processes": processes, "max_restarts": 20},
            "tracking": {"enabled": False},
        }
        self.run = RunDir.create(tree, path=path)
        self.path = self.run.path

    def journal(self, event: str, **fields: Any) -> None:
        journal.append(self.run, event, **fields)

    def submitted(self, job: int, kind: str = "first") -> None:
        self.journal("submitted", job=job, script="slurm/job_0001.sbatch", kind=kind, exclude=[])

    def started(self, attempt: int, job: int | None = None, nodes: tuple[str, ...] = ("node1", "node2")) -> None:
        self.run.attempt_path(attempt).mkdir(parents=True, exist_ok=True)
        launcher = "local" if job is None else "slurm"
        self.journal("attempt_started", attempt=attempt, launcher=launcher, job=job, nodes=list(nodes), num_processes=4)

    def ended(self, attempt: int, exit_class: str, action: str = "stop", **fields: Any) -> None:
        known = {"first_step": 0, "last_step": 10, "saved_step": 10, "rank": None, "node": None, "code": 0}
        values = {"reason": f"words for {exit_class}", "report": None, **known, **fields}
        self.journal("attempt_ended", attempt=attempt, exit_class=exit_class, action=action, **values)

    def trained(self, attempt: int, first: int, last: int, *, seconds: float = 2.0, ago: float = 1.0) -> None:
        """Steps after ``first`` up to ``last``, ``seconds`` apart, the last one ``ago`` seconds ago."""
        with MetricsLog(self.run.metrics_path, attempt) as log:
            records = [log.write("start", first, steps=100, world_size=4)]
            for step in range(first + 1, last + 1):
                metrics = {"loss": 5.0 / step, "tokens_per_s": 1000.0 + step, "step_s": 0.5, "grad_norm": 1.5}
                records.append(log.write("train", step, metrics=metrics))
        whole = self.run.metrics_path.read_text().splitlines()
        now = time.time()
        for i, record in enumerate(records):
            record["time"] = now - ago - seconds * (len(records) - 1 - i)
        lines = [*whole[: -len(records)], *(json.dumps(record) for record in records)]
        self.run.metrics_path.write_text("\n".join(lines) + "\n")

    def held(self, attempt: int, *, here: bool = True, age: float = 0.0, released: bool = False, pid: int = 0) -> None:
        """The lease of ``attempt``: by this very process, or by one on another machine ``age`` seconds ago."""
        self.run.attempt_path(attempt).mkdir(parents=True, exist_ok=True)
        number = pid or os.getpid()
        holder = Holder(
            attempt=attempt,
            host=socket.gethostname() if here else "elsewhere",
            machine=lease._machine_identity() if here else "elsewhere boot",
            pid=number,
            process_start=lease._process_start(number) or "0",
            acquired=time.time() - age - 60,
            heartbeat=time.time() - age,
            released=released,
        )
        self.run.lease_path.write_text(json.dumps(asdict(holder)))

    def beat(self, attempt: int, rank: int, **fields: Any) -> None:
        now = time.time()
        known: Mapping[str, Any] = {
            "rank": rank, "host": "h", "node": f"node{rank // 2 + 1}", "pid": 1, "time": now, "step": 10,
            "phase": "forward", "phase_since": now, "progress": 5, "collective": None,
        }  # fmt: skip
        folder = self.run.heartbeats_path(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{rank:05d}.json").write_text(json.dumps({**known, **fields}))

    def log(self, attempt: int, rank: int, text: str) -> Path:
        path = self.run.rank_log_path(attempt, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as stream:
            stream.write(text)
        return path
