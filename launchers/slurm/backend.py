"""Attempts inside a Slurm job (see :class:`launchers.lifecycle.backend.Backend`). Torch-free."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launchers.lifecycle import cancellation
from launchers.lifecycle.backend import NodeTrouble, StartError, TooFewNodesError
from launchers.lifecycle.exit_class import ExitClass, StopReason, Verdict
from launchers.lifecycle.journal import Entry
from launchers.lifecycle.ranks import Ranks
from launchers.run_dir import RunDir
from launchers.slurm import elastic
from launchers.slurm.commands import JobInfo, Slurm, SlurmError
from launchers.slurm.guardian import guarded
from launchers.slurm.node_check import check_nodes
from launchers.slurm.nodes import dead_nodes
from launchers.slurm.start import STEP_NAME, Allocation, AllocationError, rank_command
from launchers.slurm.step import SrunRanks
from launchers.slurm.submit import latest_script
from pretrain.config.launch_schema import SlurmConfig
from pretrain.config.schema import Config

_JOB_INTERVAL_S = 30.0
_NOTICE_SLACK_S = 75.0
"""Slurm looks at time limits once a minute, so that its notice comes up to so much before the asked moment."""
_NOTICE = re.compile(r"^#SBATCH\s+--signal[= ]\S*@(\d+)", re.MULTILINE)
_KILL_WAIT_S = 30.0
_TRY_AGAIN_S = 1.0


class SlurmBackend:
    """One srun step per attempt, on the nodes of ``allocation``."""

    name = "slurm"
    queue = True
    second_signal_kills = False

    def __init__(self, allocation: Allocation, slurm: Slurm, received: Sequence[int] = ()) -> None:
        self.allocation = allocation
        self.job: int | None = allocation.job
        self._slurm = slurm
        self._received = received
        self._info: JobInfo | None = None
        self._used = allocation
        self._asked = 0.0
        self._answered = False
        self._notice_s = 0.0
        self.kill_wait_s = _KILL_WAIT_S
        with contextlib.suppress(SlurmError, ValueError, KeyError):
            self.kill_wait_s = float(slurm.config()["KillWait"].split()[0])

    # ---- the attempt's nodes -----------------------------------------------------------------------------------------

    def prepare(self, run: RunDir, config: Config, excluded: frozenset[str]) -> Config:
        self._notice_s = notice_s(run.path)
        left = self._left(excluded)
        adapted = elastic.adapt(run, config, len(left.nodes))
        if adapted is None:
            launcher = config.launcher
            assert isinstance(launcher, SlurmConfig)
            raise TooFewNodesError(
                f"{len(left.nodes)} of the job's {len(self.allocation.nodes)} nodes are left "
                f"({', '.join(left.nodes) or 'none'}), which hold no layout of the run: launcher.num_nodes is "
                f"{launcher.num_nodes}, launcher.min_nodes {launcher.min_nodes}"
            )
        self._used = left.first(elastic.layout_of(adapted).num_nodes)
        return adapted

    def _left(self, excluded: frozenset[str]) -> Allocation:
        return self.allocation.without(excluded | set(self._dead(self.allocation.nodes)))

    def can_stay(self, run: RunDir, config: Config, excluded: frozenset[str]) -> bool:
        launcher = config.launcher
        assert isinstance(launcher, SlurmConfig)
        full = elastic.full_layout(run, config)
        return elastic.fit(run.config(), full, launcher.min_nodes, len(self._left(excluded).nodes)) is not None

    def nodes(self, config: Config) -> list[str]:
        return list(self._used.nodes)

    def down_nodes(self, config: Config) -> list[str]:
        return self._dead(self._used.nodes)

    def _dead(self, nodes: Sequence[str]) -> list[str]:
        """Nodes that Slurm holds for dead; none while it does not answer."""
        try:
            return dead_nodes(nodes, self._slurm)
        except SlurmError:
            return []

    def _started_since(self, nodes: Sequence[str], when: float) -> list[str]:
        """Nodes whose slurmd is younger than ``when``, in unix seconds; none while Slurm does not answer."""
        try:
            infos = self._slurm.nodes(nodes)
        except SlurmError:
            return []
        return [name for name in nodes if name in infos and (infos[name].slurmd_start or 0.0) > when]

    def check_nodes(self, run: RunDir, config: Config, attempt: int) -> NodeTrouble | None:
        launcher = config.launcher
        assert isinstance(launcher, SlurmConfig)
        if not launcher.node_check:
            return None
        with _as_start_error():
            heard = len(self._received)
            faults = check_nodes(
                config,
                run,
                attempt,
                self._used,
                stopped=lambda: len(self._received) > heard or cancellation.read(run) is not None,
            )
        if not faults:
            return None
        return NodeTrouble(tuple(faults), "; ".join(f"{node}: {reason}" for node, reason in faults.items()))

    @contextlib.contextmanager
    def start(self, run: RunDir, config: Config, attempt: int, program: Sequence[str]) -> Iterator[Ranks]:
        launcher = config.launcher
        assert isinstance(launcher, SlurmConfig)
        words = [config.cluster.rank_python or program[0], *program[1:]]
        with _as_start_error():
            command, environment = rank_command(config, run, attempt, self._used, words)
            ranks = SrunRanks(
                command,
                environment,
                run.attempt_path(attempt) / "srun.log",
                slurm=self._slurm,
                job=self.allocation.job,
                step_name=STEP_NAME.format(attempt=attempt),
                nodes=self._used.nodes,
                per_node=launcher.processes_per_node,
                tasks_are_nodes=launcher.start == "torchrun",
            )
        try:
            with guarded(run, config, attempt, self._used):
                yield ranks
        finally:
            ranks.close()

    # ---- what Slurm is about to do -----------------------------------------------------------------------------------

    def info(self, max_age_s: float = 0.0) -> JobInfo | None:
        """The job as Slurm sees it, at most so old; what was known before when Slurm does not answer."""
        now = time.monotonic()
        if self._info is None or now - self._asked >= max_age_s:
            self._asked = now
            self._answered = False
            with contextlib.suppress(SlurmError):
                self._info = self._slurm.job(self.allocation.job) or self._info
                self._answered = True
        return self._info

    def end_time(self) -> float | None:
        info = self.info(_JOB_INTERVAL_S)
        return info.end_time if info is not None else None

    def reason_of(self, number: int | None) -> StopReason | None:
        # Slurm tells every process of the job to end, commands that we run included: the first may be struck by it.
        began, info = time.monotonic(), self.info()
        while number in (signal.SIGTERM, None) and not self._answered and time.monotonic() - began < _TRY_AGAIN_S:
            time.sleep(0.1)
            info = self.info()
        return meaning_of(info, number, time.time(), self.allocation.restarts, self._notice_s)

    def vanished(self, started: Entry, last_sign: float) -> Verdict:
        nodes = [str(node) for node in started.get("nodes") or []]
        words = f"the supervisor of attempt {started['attempt']} vanished"
        # Without --no-kill any node's death ends the job, at times before its supervisor can write that down. The
        # batch script runs on the first node of a job, which an attempt leaves out only when it is at fault.
        if dead := self._dead(nodes):
            how = f"with its node {dead[0]}" if dead[0] == nodes[0] else f"when node {dead[0]} failed"
            return Verdict(ExitClass.NODE_FAILURE, f"{words} {how}", node=dead[0])
        if back := self._started_since(nodes, last_sign):
            # That one is well now: none is to be left out.
            return Verdict(ExitClass.NODE_FAILURE, f"{words} when node {back[0]} failed, which is back since")
        return Verdict(ExitClass.PREEMPTED, f"{words}: Slurm ended the job before its end was recorded")


@contextlib.contextmanager
def _as_start_error() -> Iterator[None]:
    try:
        yield
    except SlurmError as error:
        raise StartError(str(error), ExitClass.CRASH) from error
    except AllocationError as error:
        raise StartError(str(error), ExitClass.USER_ERROR) from error
    except OSError as error:
        raise StartError(f"srun cannot be started: {error}", ExitClass.CRASH) from error


def notice_s(run_path: Path) -> float:
    """Seconds before its end at which the run's last batch script asks Slurm for a signal; 0 if it asks for none."""
    try:
        text = latest_script(run_path).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return 0.0
    return max((float(found) for found in _NOTICE.findall(text)), default=0.0)


def meaning_of(
    job: JobInfo | None, number: int | None, now: float, life: int = 0, notice_s: float = 0.0
) -> StopReason | None:
    """What Slurm means by a signal to the batch script; ``number`` None: whether Slurm is about to end the job.

    ``life`` is how often the job had been queued again when this script began; ``notice_s`` how many seconds before
    its end Slurm was asked to signal it.
    None: nothing to be done now. The notice of the time limit comes early and rounded to minutes; whoever knows the
    job's end waits for the moment itself.
    """
    name = signal.Signals(number).name if number is not None else ""
    by = f" ({name})" if name else ""
    final = number == signal.SIGTERM
    if job is None:
        if number is None:
            return None
        return StopReason(ExitClass.PREEMPTED, f"Slurm asked the job to leave{by}", enforced=final)
    if job.is_cancelled(life):
        return StopReason(ExitClass.INTERRUPTED, f"the job was cancelled{by}", enforced=True)
    if job.is_preempted:
        return StopReason(ExitClass.PREEMPTED, f"the job is preempted{by}", enforced=final)
    if job.state in ("TIMEOUT", "DEADLINE") or (job.state == "COMPLETING" and job.reason == "TimeLimit"):
        return StopReason(ExitClass.TIME_LIMIT, f"the job reached its time limit{by}", enforced=True)
    if job.lost_a_node:
        return StopReason(ExitClass.NODE_FAILURE, f"Slurm ended the job for a failed node{by}", enforced=True)
    if job.is_requeued(life):
        return StopReason(ExitClass.PREEMPTED, f"the job was queued again from outside{by}", enforced=True)
    if number is None:
        return None
    if job.end_time is not None and job.end_time - now < notice_s + _NOTICE_SLACK_S and number != signal.SIGTERM:
        return None
    if job.end_time is not None and job.end_time <= now:
        return StopReason(ExitClass.TIME_LIMIT, f"the job reached its time limit{by}", enforced=True)
    return StopReason(ExitClass.PREEMPTED, f"the job was asked to leave{by}", enforced=final)
