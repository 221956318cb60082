"""The ranks of an attempt as one step of a Slurm job: srun started, listened to, signalled, ended. Torch-free.

srun tells of every task that fails, as it fails, in words that all releases share::

    srun: error: node2: task 3: Segmentation fault
    srun: error: node[1-2]: tasks 0-1,3: Exited with exit code 85

What it says goes to ``srun.log`` beside the logs of the ranks. Tasks that end well are not mentioned.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launchers.exit_codes import from_returncode
from launchers.lifecycle.exit_class import RankEnd
from launchers.slurm.commands import Slurm, SlurmError

AGENT_LOG = "torchrun_{node}.log"
"""Of a node's torchrun, beside the step's own log."""

_TASK_END = re.compile(r"^srun: error: (\S+): tasks? ([\d,\-\[\] ]+): (.+?)(?: \(core dumped\))?$")
_EXITED = re.compile(r"Exited with exit code (\d+)")
_OUT_OF_MEMORY = re.compile(r"[Oo]ut [Oo]f [Mm]emory|oom[-_ ]kill", re.IGNORECASE)
_SIGNALS = {signal.strsignal(number): int(number) for number in signal.valid_signals() if signal.strsignal(number)}
_END_AFTER_S = 8.0
"""After a kill srun is given this long to see its tasks end; it waits much longer for a node that is gone."""


def parse_task_ends(text: str) -> dict[int, int]:
    """Exit codes (128 + n for a signal n) by task, out of srun's messages; -1 stands for out of memory.

    Lines that are none of these are passed over.
    """
    found: dict[int, int] = {}
    for line in text.splitlines():
        if not (match := _TASK_END.match(line.rstrip())):
            continue
        _, tasks, how = match.groups()
        if exited := _EXITED.match(how):
            code = int(exited.group(1))
        elif _OUT_OF_MEMORY.search(how):
            code = -1
        elif how in _SIGNALS:
            code = 128 + _SIGNALS[how]
        else:
            continue
        for task in _numbers(tasks):
            found.setdefault(task, code)
    return found


def _numbers(text: str) -> list[int]:
    """``0-1,3`` -> 0, 1, 3."""
    numbers: list[int] = []
    for part in re.sub(r"[\[\] ]", "", text).split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def told_ends(log: str) -> dict[int, int]:
    """Exit codes, as a shell's, by rank of the run: those that an agent names as failed at the end of its log."""
    found = re.findall(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+)", log)
    return {int(rank): from_returncode(int(code)) for rank, code in found}


class SrunRanks:
    """A started step (see :class:`launchers.lifecycle.ranks.Ranks`).

    Args:
        nodes: of the step, in the order of ranks; ``per_node`` ranks on each.
        tasks_are_nodes: one task per node starts its ranks (torchrun): what srun says of a task is not a rank's end.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        slurm: Slurm,
        job: int,
        step_name: str,
        nodes: Sequence[str],
        per_node: int,
        tasks_are_nodes: bool = False,
    ) -> None:
        self.killed: frozenset[int] = frozenset()
        self._slurm = slurm
        self._job = job
        self._step_name = step_name
        self._nodes = list(nodes)
        self._per_node = per_node
        self._tasks_are_nodes = tasks_are_nodes
        self._log = log
        self._seen: dict[int, float] = {}
        self._size = -1
        self._task_codes: dict[int, int] = {}
        self._kill_time: float | None = None
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def num_ranks(self) -> int:
        return len(self._nodes) * self._per_node

    def ends(self) -> list[RankEnd]:
        over = self._process.poll() is not None
        codes = self._read_log()
        found = []
        for rank in range(self.num_ranks):
            node = self._nodes[rank // self._per_node]
            code = None if self._tasks_are_nodes else codes.get(rank)
            if code == -1:
                code = 128 + signal.SIGKILL
            if code is None and not over:
                continue
            if code is None and from_returncode(self._process.returncode) == 0:
                code = 0
            found.append(RankEnd(rank, code, node, self._seen.get(rank)))
        if over and self._tasks_are_nodes:
            return self._of_agents(found, codes)
        return found

    def _of_agents(self, found: list[RankEnd], codes: Mapping[int, int]) -> list[RankEnd]:
        """A node whose agent was killed took its ranks along. A rank that was killed is told by its agent's log; other
        ends are told by the ranks' own records."""
        told: dict[int, int] = {}
        for node in range(len(self._nodes)):
            with contextlib.suppress(OSError):
                log = self._log.with_name(AGENT_LOG.format(node=f"{node:05d}"))
                told |= told_ends(log.read_text(encoding="utf-8", errors="replace"))

        def code_of(end: RankEnd) -> int | None:
            of_agent = codes.get(end.rank // self._per_node, 0)
            own = of_agent if of_agent > 128 else told.get(end.rank, 0)
            return own if end.code is None and own > 128 else end.code

        return [RankEnd(end.rank, code_of(end), end.node, end.time) for end in found]

    def _read_log(self) -> dict[int, int]:
        with contextlib.suppress(OSError):
            size = os.stat(self._log).st_size
            if size != self._size:
                self._size = size
                self._task_codes = parse_task_ends(self._log.read_text(encoding="utf-8", errors="replace"))
                for task in self._task_codes:
                    self._seen.setdefault(task, time.time())
        return self._task_codes

    def num_running(self) -> int:
        if self._process.poll() is not None:
            return 0
        if self._kill_time is not None and time.monotonic() > self._kill_time + _END_AFTER_S:
            # A node that does not answer: its ranks are fenced, and nobody waits for them.
            self._process.kill()
            self._process.wait()
            return 0
        return max(1, self.num_ranks - len(self._read_log()))

    def ask_to_stop(self) -> None:
        if not self._signal_step(signal.SIGTERM):
            # srun passes this one on to its tasks; SIGTERM it would turn into SIGKILL.
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)

    def dump_stacks(self) -> None:
        self._signal_step(signal.SIGQUIT)

    def kill(self) -> None:
        if self._process.poll() is not None:
            return
        if self._kill_time is None:
            self.killed |= frozenset(range(self.num_ranks)) - set(self._read_log())
            self._kill_time = time.monotonic()
        if not self._signal_step(signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def _signal_step(self, number: int) -> bool:
        try:
            step = self._slurm.step(self._job, self._step_name)
            if step is None:
                return False
            self._slurm.signal_step(step, number)
        except SlurmError:
            return False
        return True

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def out_of_memory(self) -> frozenset[int]:
        codes = self._read_log()
        ranks = {task for task, code in codes.items() if code == -1}
        with contextlib.suppress(OSError):
            if not ranks and _OUT_OF_MEMORY.search(self._log.read_text(encoding="utf-8", errors="replace")):
                return frozenset({-1})
        return frozenset(ranks)

    def close(self) -> None:
        """Ends what is left; returns when srun is gone."""
        if self._process.poll() is None:
            self.kill()
            while self.num_running():
                self.wait(0.1)
        self._process.wait()
