"""What Slurm's commands print, as records: jobs, nodes, partitions. Torch-free.

Times are unix seconds (the commands run with ``SLURM_TIME_FORMAT=%s``) or Slurm's local ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pretrain.config.durations import parse_duration

FINAL_STATES = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)
_NODE_REASONS = frozenset(["NodeDown", "LaunchFailed", "BootFailed"])
_ENDED_BY_SLURM = _NODE_REASONS | {"TimeLimit", "DeadLine", "OutOfMemory", "SystemFailure", "Preempted"}
_NODE_UNUSABLE = frozenset(["DOWN", "DRAIN", "FAIL", "FAILING", "NOT_RESPONDING", "POWERED_DOWN", "UNKNOWN", "INVAL"])


@dataclass(frozen=True)
class JobInfo:
    """A job as the controller sees it. Times in unix seconds, None while unknown; ``nodes`` is empty while it waits.

    ``exit_code`` and ``exit_signal`` are those of the batch script, 0 while it runs.
    """

    job: int
    state: str
    reason: str
    nodes: tuple[str, ...] = ()
    partition: str = ""
    name: str = ""
    user: str = ""
    batch_host: str | None = None
    num_nodes: int = 0
    submit_time: float | None = None
    start_time: float | None = None
    end_time: float | None = None
    time_limit_s: float | None = None
    preempt_time: float | None = None
    restarts: int = 0
    exit_code: int = 0
    exit_signal: int = 0
    excluded: tuple[str, ...] = ()
    work_dir: str = ""

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def is_pending(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")

    def is_requeued(self, life: int) -> bool:
        """Whether the job has been given back to the queue since its ``life`` (restarts by then) began.

        While its processes are still being ended it shows as completing, as an ended job does."""
        return self.is_pending or (self.state == "COMPLETING" and self.restarts > life)

    def is_cancelled(self, life: int) -> bool:
        """Whether someone ended the job for good in its ``life``: by ``scancel``, say.

        Until its last process is gone such a job shows as completing, and only what it lacks tells how it ended: the
        time limit and a failed node are given as reasons, preemption leaves its time, a requeue counts a restart and
        leaves the end unknown."""
        if self.state == "CANCELLED":
            return True
        return (
            self.state == "COMPLETING"
            and not self.is_preempted
            and self.restarts == life
            and self.end_time is not None
            and self.reason not in _ENDED_BY_SLURM
        )

    @property
    def lost_a_node(self) -> bool:
        """Slurm ended the job, or is ending it, for a node of its own."""
        return self.state in ("NODE_FAIL", "BOOT_FAIL") or (self.state == "COMPLETING" and self.reason in _NODE_REASONS)

    @property
    def is_preempted(self) -> bool:
        """In this life of the job."""
        preempted = self.preempt_time is not None and self.preempt_time >= (self.start_time or 0.0)
        return self.state == "PREEMPTED" or preempted


@dataclass(frozen=True)
class NodeInfo:
    """A node: states such as ``IDLE`` and ``DRAIN`` together, its address for other nodes, what it offers."""

    name: str
    states: frozenset[str]
    reason: str
    address: str
    host_name: str
    cpus: int
    memory_mb: int
    gres: str
    slurmd_start: float | None = None

    @property
    def is_usable(self) -> bool:
        """Neither down, drained nor silent (``*`` behind a state)."""
        return not self.states & _NODE_UNUSABLE

    @property
    def state(self) -> str:
        return "+".join(sorted(self.states))


@dataclass(frozen=True)
class PartitionInfo:
    """A partition. ``max_time_s``, ``max_nodes`` and ``max_cpus_per_node`` are None without a limit."""

    name: str
    state: str
    is_default: bool
    nodes: tuple[str, ...]
    max_time_s: float | None
    max_nodes: int | None
    max_cpus_per_node: int | None
    allowed_groups: tuple[str, ...] | None
    allowed_accounts: tuple[str, ...] | None
    allowed_qos: tuple[str, ...] | None


def _fields(line: str) -> dict[str, str]:
    """``Name=value Name=value``; a value may hold blanks (Reason, Comment), a name may not."""
    parts = re.split(r"(?:^|\s)([A-Z][A-Za-z0-9:/_.]*)=", line)
    return {name: value.strip() for name, value in zip(parts[1::2], parts[2::2], strict=True)}


def parse_job(text: str, expand: Callable[[str], tuple[str, ...]] | None = None) -> JobInfo:
    """One line of ``scontrol -o show job``. ``expand`` turns a node list into names (default: one name)."""
    fields = _fields(text.strip().splitlines()[0])
    names = expand or (lambda found: (found,) if known(found) else ())
    state = fields["JobState"]
    exit_code, exit_signal = exit_of(fields.get("ExitCode", "0:0"))
    number = fields["JobId"]
    return JobInfo(
        job=int(number),
        state=state,
        reason=known(fields.get("Reason")) or "",
        nodes=tuple(names(fields.get("NodeList", ""))) if state != "PENDING" else (),
        partition=fields.get("Partition", ""),
        name=fields.get("JobName", ""),
        user=fields.get("UserId", "").partition("(")[0],
        batch_host=known(fields.get("BatchHost")),
        num_nodes=leading_integer(fields.get("NumNodes", "0").partition("-")[0]),
        submit_time=parse_time(fields.get("SubmitTime")),
        start_time=parse_time(fields.get("StartTime")),
        end_time=parse_time(fields.get("EndTime")),
        time_limit_s=parse_duration(fields.get("TimeLimit", "")),
        preempt_time=parse_time(fields.get("PreemptTime")),
        restarts=leading_integer(fields.get("Restarts", "0")),
        exit_code=exit_code,
        exit_signal=exit_signal,
        excluded=tuple(names(fields.get("ExcNodeList", ""))),
        work_dir=fields.get("WorkDir", ""),
    )


def parse_node(line: str) -> NodeInfo:
    """One line of ``scontrol -o show node``."""
    fields = _fields(line)
    state = fields["State"]
    states = {word.rstrip("*~#!%$@^-") for word in state.split("+")}
    if "*" in state:
        states.add("NOT_RESPONDING")
    return NodeInfo(
        name=fields["NodeName"],
        states=frozenset(states),
        reason=known(fields.get("Reason")) or "",
        address=fields.get("NodeAddr", fields["NodeName"]),
        host_name=fields.get("NodeHostName", fields["NodeName"]),
        cpus=leading_integer(fields.get("CPUTot", "0")),
        memory_mb=leading_integer(fields.get("RealMemory", "0")),
        gres=known(fields.get("Gres")) or "",
        slurmd_start=parse_time(fields.get("SlurmdStartTime")),
    )


def parse_partition(line: str, expand: Callable[[str], tuple[str, ...]] | None = None) -> PartitionInfo:
    """One line of ``scontrol -o show partition``."""
    fields = _fields(line)
    names = expand or (lambda found: (found,) if known(found) else ())

    def allowed(name: str) -> tuple[str, ...] | None:
        value = fields.get(name, "ALL")
        return None if value in ("ALL", "(null)", "N/A") else tuple(value.split(","))

    def limit(name: str) -> int | None:
        value = fields.get(name, "UNLIMITED")
        return int(value) if value.isdigit() else None

    return PartitionInfo(
        name=fields["PartitionName"],
        state=fields.get("State", "UP"),
        is_default=fields.get("Default") == "YES",
        nodes=tuple(names(fields.get("Nodes", ""))),
        max_time_s=parse_duration(fields.get("MaxTime", "")),
        max_nodes=limit("MaxNodes"),
        max_cpus_per_node=limit("MaxCPUsPerNode"),
        allowed_groups=allowed("AllowGroups"),
        allowed_accounts=allowed("AllowAccounts"),
        allowed_qos=allowed("AllowQos"),
    )


def parse_time(text: str | None) -> float | None:
    """Unix seconds, or Slurm's local ``2026-01-31T12:00:00``; None for ``Unknown``, ``N/A``, ``None``."""
    if text is None:
        return None
    if text.isdigit():
        return float(text) or None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def known(text: str | None) -> str | None:
    return None if text in (None, "", "None", "(null)", "N/A", "Unknown") else text


def leading_integer(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match.group()) if match else 0


def exit_of(text: str) -> tuple[int, int]:
    code, _, number = text.partition(":")
    return leading_integer(code), leading_integer(number)
