"""What Slurm says about jobs, for those who watch runs: one ``squeue`` for all of them. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from launchers.slurm.commands import Slurm, SlurmError, parse_time

TIMEOUT_S = 15.0
"""A controller that is busy for longer is not waited for: what the run directories say is shown without it."""

# One job a line; the reason comes last because it alone may hold anything.
_FORMAT = "%i|%T|%S|%e|%N|%r"

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
ACTIVE = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
)


@dataclass(frozen=True)
class JobView:
    """A job as Slurm has it now. ``start`` (expected or actual) and ``end`` in unix seconds, if known."""

    state: str
    reason: str | None = None
    start: float | None = None
    end: float | None = None
    nodes: str | None = None

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


@dataclass(frozen=True)
class Jobs:
    """Slurm's answer. ``asked`` is False where there is no Slurm or it did not answer; ``fault`` says why."""

    views: Mapping[str, JobView] = field(default_factory=dict)
    asked: bool = False
    fault: str | None = None


def ask_slurm(jobs: Iterable[str], timeout_s: float = TIMEOUT_S) -> Jobs:
    """What Slurm knows of ``jobs``; those it does not know (any more) are absent. Never raises."""
    wanted = sorted({job for job in jobs if job.replace("_", "").isalnum()})
    if not wanted:
        return Jobs()
    try:
        return Jobs(parse_squeue(Slurm(timeout_s=timeout_s).squeue(_FORMAT, wanted)), asked=True)
    except SlurmError as error:
        return Jobs(fault=str(error))


def parse_squeue(output: str) -> dict[str, JobView]:
    """Views by job id from lines in this module's format; other lines are passed over."""
    views = {}
    for line in output.splitlines():
        parts = line.strip().split("|", 5)
        if len(parts) != 6 or not parts[0]:
            continue
        job, state, start, end, nodes, reason = (part.strip() for part in parts)
        views[job] = JobView(state.upper(), _known(reason), _when(start), _when(end), _known(nodes))
    return views


def _known(value: str) -> str | None:
    if value.startswith("(") and value.endswith(")"):
        value = value[1:-1]
    return None if value in ("", "None", "N/A", "null") else value


def _when(value: str) -> float | None:
    return parse_time(value if value.isascii() else None)
