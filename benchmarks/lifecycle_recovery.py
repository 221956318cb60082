"""How long a run takes to begin on Slurm, and to come back after each kind of fault.

    python benchmarks/lifecycle_recovery.py [--only kill hang] [--rounds 3]

Runs of two ranks on two nodes of a Slurm that is started for this, on this one machine: the virtual cluster of the
tests (Debian: ``apt-get install slurmctld slurmd slurm-client munge``). The model is tiny, so that what is measured is
the platform's own part, process start and imports; on a site, waiting in the queue, reading of a large checkpoint and
compilation come to it.

- *first step*: from the moment at which the job is queued to the end of its first step, in parts.
- *recovery*: from the moment of the fault to the end of the first step that had not been done before.
- *steps lost*: steps done before the fault that had to be repeated. A checkpoint is saved every two steps, and the
  faults come in the step after the one that follows a checkpoint, so that one is the least; a run that was warned
  (preempted, asked to leave) loses none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from results_file import write_result
from support.faults import fault, faulty
from support.slurm_cluster import SlurmCluster, wait_until
from support.slurm_run import SlurmRun
from support.small_text import prepare_small_text, small_run

from pretrain.tracking.metrics_log import Record, read_records

STEPS, AT = 10, 6
HANG_TIMEOUT_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SCENARIOS), help="scenarios to run (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    chosen = arguments.only or list(SCENARIOS)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as place, SlurmCluster() as cluster:
        data = prepare_small_text(Path(place) / "data")
        for number in range(arguments.rounds):
            for name in chosen:
                folder = Path(place) / f"{name}_{number}"
                folder.mkdir()
                found[name].append(SCENARIOS[name](Scene(cluster, folder, data)))
                print(f"round {number + 1}, {name}: {shown(found[name][-1])}", flush=True)
                cluster.heal()
    print()
    medians = {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    for name, figures in medians.items():
        print(f"{name:<16} {shown(figures)}")
    write_result("lifecycle_recovery", {"arguments": vars(arguments), "medians": medians, "rounds": found})


def shown(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.1f}" for name, value in figures.items())


class Scene:
    """One run on the cluster, in a folder of its own."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.gate, self.mark = folder / "gate", folder / "once"

    def run(self, *overrides: str) -> SlurmRun:
        return SlurmRun(
            self.cluster, self.folder / "run", *small_run(self.data), f"train.steps={STEPS}", "train.eval_interval=0",
            "train.micro_batch_size=1", "train.checkpoint_interval=2", "lifecycle.heartbeat_interval_s=1",
            "train.async_checkpoints=false", f"lifecycle.hang_timeout_s={HANG_TIMEOUT_S:g}", *overrides,
        )  # fmt: skip

    def recovery(self, run: SlurmRun, began: float | None = None) -> dict[str, float]:
        """Figures of a run that comes back from a fault at ``began`` (None: when the faulty component says)."""
        run.wait(240)
        if began is None:
            began = min(path.stat().st_mtime for path in self.folder.glob("once.*"))
        ends = run.events("attempt_ended")
        reached = max(end["last_step"] or 0 for end in ends[:-1])
        first_new = next(r for r in records(run) if r["event"] == "train" and r["step"] > reached and r["attempt"] > 1)
        lost = reached - (ends[0]["saved_step"] or 0)
        return {"recovery_s": first_new["time"] - began, "steps_lost": float(lost)}


def records(run: SlurmRun) -> list[Record]:
    return read_records(run.path / "metrics.jsonl")


def first_step(scene: Scene) -> dict[str, float]:
    """The parts of a start, in their order."""
    run = scene.run()
    run.wait(240)
    submitted, started = run.events("submitted")[0]["time"], run.events("attempt_started")[0]["time"]
    job_began = _start_time(run)
    of = records(run)
    joined = next(r["time"] for r in of if r["event"] == "phase")
    ready = next(r["time"] for r in of if r["event"] == "start")
    done = next(r["time"] for r in of if r["event"] == "train")
    return {
        "first_step_s": done - submitted,
        "queue_s": job_began - submitted,
        "supervisor_s": started - job_began,
        "check_and_processes_s": joined - started,
        "building_s": ready - joined,
        "step_s": done - ready,
    }


def _start_time(run: SlurmRun) -> float:
    text = run.cluster.run("env", "SLURM_TIME_FORMAT=%s", "scontrol", "-o", "show", "job", str(run.job))
    return float(text.split(" StartTime=")[1].split()[0])


def rank_fault(kind: str) -> Callable[[Scene], dict[str, float]]:
    def scenario(scene: Scene) -> dict[str, float]:
        return scene.recovery(scene.run(*faulty(fault(kind, AT, rank=1, once=scene.mark))))

    return scenario


def held(act: Callable[[Scene, SlurmRun], None], *overrides: str) -> Callable[[Scene], dict[str, float]]:
    """The run waits in step ``AT`` until ``act`` has been done to it."""

    def scenario(scene: Scene) -> dict[str, float]:
        run = scene.run(*overrides, *faulty(fault("hold", AT, until=scene.gate)))
        run.wait_for_step(AT - 1)
        began = time.time()
        act(scene, run)
        scene.gate.touch()
        return scene.recovery(run, began)

    return scenario


def _preempt(scene: Scene, run: SlurmRun) -> None:
    scene.cluster.run("sbatch", "-p", "high", "-N4", "--exclusive", "--wrap=true", cwd=scene.folder)
    _wait_until_asked(run)


def _requeue(scene: Scene, run: SlurmRun) -> None:
    scene.cluster.run("scontrol", "requeue", str(run.job))
    _wait_until_asked(run)


def _wait_until_asked(run: SlurmRun) -> None:
    """The run would be over before Slurm's signal comes, with steps as short as these."""
    wait_until(lambda: "asked" in run.describe() or len(run.events("attempt_started")) > 1, "the ranks to be asked", 60)


def _kill_node(scene: Scene, run: SlurmRun) -> None:
    scene.cluster.kill_node("node2")


def _kill_batch_host(scene: Scene, run: SlurmRun) -> None:
    scene.cluster.kill_node("node1")


SCENARIOS: dict[str, Callable[[Scene], dict[str, float]]] = {
    "first_step": first_step,
    "killed": rank_fault("kill"),
    "crash": rank_fault("raise"),
    "host_memory": rank_fault("host_memory"),
    "hang": rank_fault("spin"),
    "preempted": held(_preempt),
    "requeued": held(_requeue),
    "node": held(_kill_node),
    "node_elastic": held(_kill_node, "launcher.min_nodes=1"),
    "batch_host": held(_kill_batch_host),
}


if __name__ == "__main__":
    main()
