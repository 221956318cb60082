"""What heartbeats, health checks and tracking cost a real run: microseconds per step and share of a step.

    python benchmarks/watching_overhead.py [--data data/stdlib] [--steps 400] [--processes 1] [OVERRIDE ...]

Trains the demo's model under the supervisor with everything on (heartbeats, flight recorder, spike detection, system
metrics, MLflow in SQLite) and counts, inside rank 0 and from its hundredth step on (by then MLflow, which takes two
seconds to import in a thread of its own, is there), what the platform spends on watching it:

- on the training thread, by wall clock: marks of phases, the step gate (all of the gated step but DeepSpeed's own),
  the judgement of the step, and the callbacks that write records;
- in threads of their own, by their processor time, for they take the interpreter's lock from the training thread and
  nothing else: heartbeat, system metrics, sending to MLflow.

By default the sequences are so short that a step takes about 100 ms on two cores: in longer ones the share is smaller.
Wrapping each call for its time costs more than some of them and is counted as theirs. The supervisor runs beside the
ranks on a core of its own; its processor time is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results_file import write_result

SHORT_STEPS = ["train.global_batch_size=4", "train.micro_batch_size=2", "data.sequence_length=128"]
SKIPPED = 100
THREADS = ("heartbeat", "system-metrics", "mlflow-tracker")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="of the run; default: short sequences")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counted, supervisor_s = _train(Path(folder), arguments)
    steps, wall_s = counted["steps"], counted["wall_s"]
    parts = {name: seconds / steps * 1e6 for name, seconds in counted["main"].items()}
    threads = {name: seconds / wall_s for name, seconds in counted["threads"].items()}
    step_s = wall_s / steps
    for name, microseconds in parts.items():
        print(f"{name:<24} {microseconds:>9.1f} us per step   {microseconds / 1e6 / step_s:.4%}")
    for name, share in threads.items():
        print(f"thread {name:<17} {share * step_s * 1e6:>9.1f} us per step   {share:.4%}")
    total = sum(parts.values()) / 1e6 / step_s + sum(threads.values())
    verdict = "reached" if total < 0.01 else "NOT reached"
    print(f"all, of steps of {step_s * 1e3:.0f} ms: {total:.3%}; goal below 1%: {verdict}")
    print(f"supervisor, beside the ranks: {supervisor_s / wall_s:.3%} of a core")
    write_result(
        "watching_overhead",
        {
            "arguments": vars(arguments),
            "us_per_step": parts,
            "share_of_threads": threads,
            "step_ms": step_s * 1e3,
            "share_of_step": total,
            "supervisor_share_of_a_core": supervisor_s / wall_s,
            "counted": counted,
        },
    )


def _train(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], float]:
    from launchers.lease import Lease
    from launchers.lifecycle.supervise import Supervisor
    from launchers.local import LocalBackend
    from launchers.run_dir import RunDir
    from pretrain.config.check import check
    from pretrain.config.compose import load_run_config
    from pretrain.config.freeze import frozen_for_new_run

    tree, _ = load_run_config(
        [
            "experiment=demo", f"data.path={Path(arguments.data).absolute()}", f"train.steps={arguments.steps}",
            f"launcher.num_processes={arguments.processes}", "train.eval_interval=0", "train.sample_interval=0",
            "train.checkpoint_interval=0", "health.on_spike=skip", "health.spike_window=16",
            f"tracking.store={folder / 'mlruns'}", *(arguments.overrides or SHORT_STEPS),
        ]
    )  # fmt: skip
    tree = frozen_for_new_run(tree)
    run = RunDir.create(tree, path=folder / "run")
    program = [sys.executable, str(Path(__file__).resolve()), "--rank"]
    before = resource.getrusage(resource.RUSAGE_SELF)
    with Lease.acquire(run) as lease:
        outcome = Supervisor(
            run, LocalBackend(), lease, check(tree), program=[*program, str(run.path)], command=["benchmark"]
        ).supervise()
    after = resource.getrusage(resource.RUSAGE_SELF)
    if outcome.code:
        raise SystemExit(outcome.verdict.reason)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads((run.path / "counted.json").read_text()), spent


class _Count:
    """Seconds by name, from the end of step ``SKIPPED`` to that of the last."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = -SKIPPED
        self.began = self.ended = 0.0
        self._clocks: dict[str, int] = {}
        self._first: dict[str, float] = {}
        self.threads: dict[str, float] = {}
        self._main = threading.main_thread()
        self._within: list[str] = []

    def wrap(self, owner: Any, method: str, name: str, less: str | None = None) -> None:
        """Counts the calls of ``owner.method`` on the main thread as ``name``; with ``less`` takes those within a call
        that is counted as ``less`` from that."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not self._main:
                return inner(*args, **kwargs)
            self._within.append(name)
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                self._within.pop()
                self.seconds[name] += spent
                if less in self._within:
                    self.seconds[str(less)] -= spent

        setattr(owner, method, timed)

    def a_step_ended(self) -> None:
        self.steps += 1
        now = time.perf_counter()
        if self.steps == 0:
            self.began = now
            self.seconds.clear()
            for thread in threading.enumerate():
                if thread.name in THREADS and thread.ident is not None:
                    self._clocks[thread.name] = time.pthread_getcpuclockid(thread.ident)
            self._first = {name: time.clock_gettime(clock) for name, clock in self._clocks.items()}
        elif self.steps > 0:
            self.ended = now
            self.threads = {name: time.clock_gettime(clock) - self._first[name] for name, clock in self._clocks.items()}


def _rank(run_path: str) -> int:
    """One rank of the run, its parts wrapped."""
    from pretrain.engines import deepspeed_gate
    from pretrain.parallel.pulse import Pulse
    from pretrain.training import callbacks, data_metrics, data_state, entry, health, health_callback, loop

    count = _Count()
    for method in ("enter", "completed", "tick"):
        count.wrap(Pulse, method, "marks of phases")
    count.wrap(health.HealthMonitor, "judge", "judgement")
    count.wrap(health.HealthMonitor, "passed", "judgement")
    count.wrap(callbacks.MetricsCallback, "after_step", "record of the step")
    count.wrap(data_metrics.DataMetricsCallback, "after_step", "numbers of the data")
    count.wrap(data_state.DataCallback, "after_step", "numbers of the data")
    count.wrap(health_callback.HealthCallback, "after_step", "judgement")
    # What the gate adds: its step less DeepSpeed's own, whose norm and update it lets through unchanged.
    count.wrap(deepspeed_gate._ZeroGate, "step", "gate")
    import deepspeed

    count.wrap(deepspeed.DeepSpeedEngine, "step", "of DeepSpeed", less="gate")
    step = loop.Trainer._step

    def counted_step(*args: Any) -> Any:
        record = step(*args)
        count.a_step_ended()
        return record

    loop.Trainer._step = counted_step  # type: ignore[method-assign,assignment]
    code = entry.main([run_path])
    if os.environ.get("SLURM_PROCID", "0") == "0":
        count.seconds.pop("of DeepSpeed", None)
        found = {
            "main": dict(count.seconds), "threads": count.threads, "steps": count.steps,
            "wall_s": count.ended - count.began,
        }  # fmt: skip
        (Path(run_path) / "counted.json").write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(_rank(sys.argv[2]))
    main()
