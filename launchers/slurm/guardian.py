"""A watch on the batch host, kept on another node of the job: ``python -m launchers.slurm.guardian RUN_DIR ...``.

Jobs of elastic runs have ``--no-kill``, so that the supervisor may go on without a node that dies. Slurm then keeps the
job, too, when the node that dies is the batch host: nobody would supervise it up to its time limit. The guardian sees
that the supervisor's lease is no longer renewed, asks Slurm whether the batch host is dead, and if so queues the job
again. A lease that stands still for another reason, such as a file system that stalls, is left alone. Torch-free.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launchers.run_dir import RunDir
from launchers.slurm.commands import Slurm, SlurmError
from launchers.slurm.nodes import dead_nodes
from launchers.slurm.start import Allocation
from pretrain.config.schema import Config

INTERVAL_S = 5.0
SILENCE_S = 20.0
"""Four beats of the lease."""


def watch(run: RunDir, attempt: int, job: int, host: str, slurm: Slurm) -> bool:
    """Watches until the attempt is over, or its supervisor's node is dead and the job is queued again (True)."""
    seen, since = b"", time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            found = run.lease_path.read_bytes()
            if found != seen:
                seen, since = found, time.monotonic()
        if _is_over(seen, attempt):
            return False
        if time.monotonic() - since > SILENCE_S:
            try:
                if dead_nodes([host], slurm):
                    print(f"the batch host {host} is dead: queueing job {job} again", flush=True)
                    slurm.requeue(job)
                    return True
            except SlurmError as error:
                print(error, flush=True)
        time.sleep(INTERVAL_S)


def _is_over(lease: bytes, attempt: int) -> bool:
    try:
        record = json.loads(lease)
        return bool(record["released"]) or int(record["attempt"]) != attempt
    except (ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def guarded(run: RunDir, config: Config, attempt: int, used: Allocation) -> Iterator[None]:
    """A guardian for the time of an attempt, on the first node that is not the batch host; none on a single node."""
    others = [node for node in used.nodes if node != used.host]
    if not others:
        yield
        return
    command = [
        "srun",
        f"--job-name=guardian_{attempt:04d}",
        "--nodes=1",
        f"--nodelist={others[0]}",
        "--ntasks=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--overlap",
        "--no-kill",
        "--mpi=none",
        "--export=ALL",
        "--input=none",
        f"--output={run.attempt_path(attempt) / 'guardian.log'}",
        config.cluster.python or sys.executable,
        "-m",
        "launchers.slurm.guardian",
        str(run.path),
        f"--attempt={attempt}",
        f"--job={used.job}",
        f"--host={used.host}",
    ]
    with open(run.attempt_path(attempt) / "guardian.log", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    # Never ended from here. A supervisor whose node is dying may get as far as leaving this, and srun, asked to end,
    # would take the guardian along in the moment that it is for. It ends by itself when it sees the attempt's lease
    # released or replaced, at the latest with the job.
    _started[:] = [earlier for earlier in _started if earlier.poll() is None] + [process]
    yield


_started: list[subprocess.Popen[bytes]] = []
"""Kept so that ended ones are reaped."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="launchers.slurm.guardian", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--job", type=int, required=True)
    parser.add_argument("--host", required=True)
    arguments = parser.parse_args()
    watch(RunDir(arguments.run_dir), arguments.attempt, arguments.job, arguments.host, Slurm(timeout_s=20.0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
