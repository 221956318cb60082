"""A run on the test cluster as its user sees it: command, job, journal, losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.command import Outcome
from support.slurm_cluster import SlurmCluster, wait_until

from launchers.lifecycle.journal import read_journal
from launchers.run_dir import RunDir
from pretrain.tracking.metrics_log import read_records


class SlurmRun:
    """``pretrain run launcher=slurm`` in ``path``, submitted by the constructor; ``output`` is what it printed."""

    def __init__(self, cluster: SlurmCluster, path: Path, *overrides: str, nodes: int = 2, processes: int = 2) -> None:
        self.cluster = cluster
        self.outcome = Outcome(path)
        result = cluster.pretrain(
            "run", "--run-dir", path, *overrides,
            "launcher=slurm", f"launcher.num_nodes={nodes}", f"launcher.num_processes={processes}",
            "launcher.threads_per_process=1", "cluster.partition=low",
            cwd=path.parent,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        self.output = result.stdout

    @property
    def path(self) -> Path:
        return self.outcome.path

    def journal(self) -> list[dict[str, Any]]:
        return list(read_journal(RunDir.open(self.path)))

    @property
    def job(self) -> int:
        return int([entry for entry in self.journal() if "job" in entry][-1]["job"])

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.journal() if entry["event"] == name]

    def ends(self) -> list[tuple[str, str]]:
        """Exit class and action of every attempt that has ended."""
        return [(entry["exit_class"], entry["action"]) for entry in self.events("attempt_ended")]

    def wait_for_step(self, step: int, timeout: float = 90.0) -> None:
        """Until the run's record holds ``step``."""
        wait_until(lambda: self._reached(step) or self._over(), f"step {step}:\n{self.describe()}", timeout)
        assert self._reached(step), self.describe()

    def wait_for_attempts(self, count: int, timeout: float = 90.0) -> None:
        """Until so many attempts have begun."""
        wait_until(lambda: len(self.events("attempt_started")) >= count, f"attempt {count}", timeout)

    def wait(self, timeout: float = 180.0) -> list[tuple[str, str]]:
        """Until the run is over: its last attempt has ended and no other follows. Returns :meth:`ends`."""
        try:
            wait_until(self._over, "the run to be over", timeout, 0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe()}") from None
        return self.ends()

    def _over(self) -> bool:
        entries = [entry for entry in self.journal() if entry["event"] in ("attempt_started", "attempt_ended")]
        return bool(entries) and entries[-1]["event"] == "attempt_ended" and entries[-1]["action"] == "stop"

    def _reached(self, step: int) -> bool:
        path = self.path / "metrics.jsonl"
        records = read_records(path) if path.exists() else []
        return any(record["event"] == "train" and record["step"] >= step for record in records)

    def describe(self) -> str:
        """Journal, logs and job, for the message of a failed test."""
        logs = sorted(path for path in self.path.rglob("*") if path.suffix in (".log", ".out") and path.is_file())
        parts = [str(entry) for entry in self.journal()]
        for path in logs:
            parts.append("\n".join([f"== {path}", *path.read_text(errors="replace").splitlines()[-15:]]))
        return "\n".join(parts)
