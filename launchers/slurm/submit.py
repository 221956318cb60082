"""Submitting a run: the batch script is rendered into the run directory, queued, and noted in the journal."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launchers.lease import LeaseHeldError, current_holder, shows_life
from launchers.lifecycle import cancellation
from launchers.lifecycle.deadline import lead_s
from launchers.lifecycle.journal import Entry, append, last_entry, read_journal
from launchers.run_dir import RunDir, RunDirectoryError
from launchers.slurm.commands import JobInfo, Slurm, SlurmError, parse_duration
from launchers.slurm.script import Template, render, template_path
from pretrain.config.files import atomic_write_text, exclusive_write_text, way_out

if TYPE_CHECKING:
    from pretrain.config.schema import Config

Kind = Literal["first", "resume", "chain"]
_SCRIPT = re.compile(r"job_(\d{4,})\.sbatch$")
_LOOKS = 3
_LOOK_AGAIN_S = 2.0
_LEAST_LEAD_S = 60
"""Slurm looks at time limits about once a minute, so a shorter notice may not come at all."""


@dataclass(frozen=True)
class Script:
    """A rendered batch script, not yet written."""

    text: str
    template: Template


def prepare(
    config: Config,
    run_path: Path,
    *,
    kind: Kind = "first",
    exclude: Iterable[str] = (),
    working_dir: Path | None = None,
) -> Script:
    """The batch script as it would be submitted; touches nothing. Raises TemplateError.

    A ``chain`` takes the template that the run was last submitted with, even if the file has changed since; so does a
    run continued by its user when the file that it was configured with is gone.
    """
    template = template_of(config, run_path, kind)
    text = render(
        config,
        run_path,
        template,
        signal_lead_s=signal_lead_s(config, run_path),
        exclude=exclude,
        working_dir=working_dir,
    )
    return Script(text, template)


def template_of(config: Config, run_path: Path, kind: Kind = "first") -> Template:
    """The template that the run's next script is rendered from. Raises TemplateError when it cannot be read."""
    frozen = template_copy(run_path)
    if frozen.is_file() and (kind == "chain" or _own_template_is_gone(config, run_path)):
        return Template(frozen.read_text(encoding="utf-8"), frozen)
    return Template.read(config)


def _own_template_is_gone(config: Config, run_path: Path) -> bool:
    if template_path(config).is_file():
        return False
    # Another name than the run's own is a wish of now, and must not be met by an old copy.
    named = RunDir.open(run_path).config().get("launcher", {}).get("template")
    return bool(named == getattr(config.launcher, "template", None))


def signal_lead_s(config: Config, run_path: Path) -> int:
    """Seconds before its end at which Slurm is to signal the job: as the deadline has it, at most half the limit."""
    limit = parse_duration(getattr(config.launcher, "time_limit", "")) or math.inf
    lead = max(_LEAST_LEAD_S, math.ceil(lead_s(run_path / "metrics.jsonl", config.lifecycle)))
    return int(max(1, min(lead, limit / 2)))


def submit(
    run: RunDir,
    config: Config,
    kind: Kind,
    exclude: Iterable[str] = (),
    *,
    working_dir: Path | None = None,
    slurm: Slurm | None = None,
) -> int:
    """Renders, writes ``slurm/job_NNNN.sbatch``, queues it and appends ``submitted`` to the journal.

    ``first`` and ``resume`` are a user's, ``chain`` the supervisor's own when a job comes back by a new submission.
    Returns the job id. Raises TemplateError, SlurmError (nothing is queued then; if it is transient, nobody knows),
    LeaseHeldError when the run is queued or at work already, RunDirectoryError when the run directory cannot be written
    or another process submits the same run at the same moment.
    """
    excluded = sorted(set(exclude))
    slurm = slurm or Slurm()
    with submission_lock(run):
        if kind != "chain":
            _refuse_if_busy(run, slurm)
            cancellation.withdraw(run)  # a wish of before; whoever submits the run wants it
        script = prepare(config, run.path, kind=kind, exclude=excluded, working_dir=working_dir)
        return _queue(run, script, kind, excluded, slurm)


def _queue(run: RunDir, script: Script, kind: Kind, excluded: list[str], slurm: Slurm) -> int:
    path = _write(run, script)
    try:
        job = slurm.submit(path)
    except SlurmError as error:
        if error.transient:
            job = _find_queued(path, slurm, error, run)
        else:
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".refused"))
            raise type(error)(
                f"{error}\nNothing was queued. The run directory {run.path} is complete; once this is mended: pretrain "
                f"resume {run.path} (changes of launcher and cluster go behind it)",
                transient=error.transient,
            ) from error
    script_name = str(path.relative_to(run.path))
    try:
        append(run, "submitted", job=job, script=script_name, kind=kind, exclude=excluded)
    except OSError as error:
        raise RunDirectoryError(
            f"{run.lifecycle_path}: cannot be written ({error.strerror}), but job {job} is queued: end it with "
            f"`scancel {job}` or make room, so that it can run"
        ) from error
    return job


def _find_queued(script: Path, slurm: Slurm, fault: SlurmError, run: RunDir) -> int:
    """The job that came of a submission which Slurm did not confirm. Raises SlurmError when there is no sign of it."""
    what = "does not answer"
    for attempt in range(_LOOKS):
        if attempt:
            time.sleep(_LOOK_AGAIN_S)
        try:
            if jobs := slurm.jobs_of_script(script):
                return jobs[-1]
            what = "has no such job at this moment"
        except SlurmError:
            continue
    raise type(fault)(
        f"{fault}\nIt is not known whether the job was queued: Slurm {what}, and may have taken it all the same. Look "
        f"for {script} with `squeue --me -o '%A %T %o'`. When Slurm answers again: pretrain resume {run.path} (it "
        "looks for that job first, and queues another one only if there is none)",
        transient=True,
    ) from fault


def _unconfirmed(run: RunDir, journal: Iterable[Entry]) -> list[Path]:
    """Scripts of which the journal does not say what became of them: the command that submitted them did not live to
    hear it. Those that Slurm refused bear another name."""
    confirmed = {entry.get("script") for entry in journal if entry["event"] == "submitted"}
    scripts = sorted((run.path / "slurm").glob("job_*.sbatch"))
    return [path for path in scripts if str(path.relative_to(run.path)) not in confirmed]


@contextlib.contextmanager
def submission_lock(run: RunDir) -> Iterator[None]:
    """One submission of a run at a time, on all hosts that share its folder. Raises RunDirectoryError when busy."""
    import fcntl

    global _lock_depth
    if _lock_depth:  # this process has it already
        yield
        return
    try:
        (run.path / "slurm").mkdir(exist_ok=True)
        descriptor = os.open(run.path / "slurm" / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunDirectoryError(
            f"{run.path / 'slurm'}: cannot be written ({error.strerror}); {way_out(error)}"
        ) from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunDirectoryError(
                f"{run.path}: another process is submitting this run at this moment; see `pretrain status {run.path}`"
            ) from None
        except OSError:
            pass  # a file system without locks: the numbered script is made once all the same
        _lock_depth += 1
        try:
            yield
        finally:
            _lock_depth -= 1
    finally:
        os.close(descriptor)


_lock_depth = 0


@contextlib.contextmanager
def busy_lock(run: RunDir, slurm: Slurm | None = None) -> Iterator[int]:
    """Keeps a run that is neither queued nor at work for a submission; gives the number of the attempt to come.

    Raises LeaseHeldError when it is queued or at work, RunDirectoryError when another process is submitting it.
    """
    with submission_lock(run):
        _refuse_if_busy(run, slurm or Slurm())
        holder = current_holder(run)
        yield holder.attempt + 1 if holder is not None else 1


def _refuse_if_busy(run: RunDir, slurm: Slurm) -> None:
    """Raises LeaseHeldError when the run has a job that waits or runs, or is at work on some machine."""
    if (job := live_job(run, slurm)) is not None:
        _adopt(run, job)
        raise LeaseHeldError(
            f"{run.path}: job {job.job} of this run is {job.state} already; watch it with `pretrain status "
            f"{run.path}`, end it with `pretrain cancel {run.path}`"
        )
    holder = current_holder(run)
    # What a job held is free when the job is over, whatever the lease still says. Of a job that this Slurm has never
    # heard of, as one of another cluster, that cannot be known.
    if (
        holder is not None
        and shows_life(holder)
        and (holder.job is None or not holder.job.isdigit() or slurm.job(int(holder.job)) is None)
    ):
        raise LeaseHeldError(
            f"{run.path}: held by process {holder.pid} on {holder.host} (attempt {holder.attempt}), which is at work. "
            f"Stop it with `pretrain cancel {run.path}`, then try again"
        )


def _write(run: RunDir, script: Script) -> Path:
    folder = run.path / "slurm"
    try:
        folder.mkdir(exist_ok=True)
        numbers = [int(match[1]) for entry in folder.iterdir() if (match := _SCRIPT.match(entry.name))]
        path = folder / f"job_{max(numbers, default=0) + 1:04d}.sbatch"
        if script.template.path != template_copy(run.path):
            atomic_write_text(template_copy(run.path), script.template.text)
        exclusive_write_text(path, script.text)
    except FileExistsError as error:
        raise RunDirectoryError(
            f"{run.path}: another process is submitting this run at this moment; see `pretrain status {run.path}`"
        ) from error
    except OSError as error:
        raise RunDirectoryError(
            f"{folder}: the batch script cannot be written ({error.strerror}); {way_out(error)}"
        ) from error
    return path


def template_copy(run_path: Path) -> Path:
    """The template of the last submission, so that later ones of the same run need no other file."""
    return run_path / "slurm" / "template.j2"


def latest_script(run_path: Path) -> Path:
    """The batch script of the last submission."""
    return max((run_path / "slurm").glob("job_*.sbatch"), key=lambda path: int(path.stem.partition("_")[2]))


def job_log_path(run_path: Path, job: int) -> Path:
    """What the batch script and the supervisor print."""
    return run_path / "slurm" / f"job_{job}.log"


def live_job(run: RunDir, slurm: Slurm | None = None) -> JobInfo | None:
    """A job of the run that waits or runs; None when all have ended or there was none. Raises SlurmError.

    That is the last one in the journal, one that holds the run, or one of which the journal does not know: whoever
    submitted it was not told.
    """
    journal = read_journal(run)
    slurm = slurm or Slurm()
    named = [last_entry(journal, "submitted", "requeued"), last_entry(journal, "attempt_started")]
    jobs = [str(entry["job"]) for entry in named if entry is not None and entry.get("job") is not None]
    holder = current_holder(run)
    if holder is not None and holder.job is not None and not holder.released:
        jobs.append(holder.job)
    for job in dict.fromkeys(jobs):
        if job.isdigit() and (info := slurm.job(int(job))) is not None and not info.is_final:
            return info
    for script in _unconfirmed(run, journal):
        for number in slurm.jobs_of_script(script):
            if (info := slurm.job(number)) is not None and not info.is_final:
                return info
    return None


def _adopt(run: RunDir, job: JobInfo) -> None:
    """Notes a job that the journal does not know, so that the run is seen to wait and can be cancelled."""
    journal = read_journal(run)
    if any(str(entry.get("job")) == str(job.job) for entry in journal):
        return
    scripts = _unconfirmed(run, journal)
    name = str(scripts[-1].relative_to(run.path)) if scripts else None
    kind: Kind = "resume" if last_entry(journal, "submitted", "attempt_started") else "first"
    with contextlib.suppress(OSError):
        append(run, "submitted", job=job.job, script=name, kind=kind, exclude=[])


def refuse_if_queued(run: RunDir) -> None:
    """For who is about to work on the run outside Slurm: raises LeaseHeldError while a job of it waits or runs there.

    SlurmError when Slurm does not answer; where there is no Slurm, and nothing to be known of it, that is said.
    """
    if not any(entry.get("job") is not None for entry in read_journal(run)) and not _unconfirmed(run, ()):
        return
    try:
        with submission_lock(run):
            _refuse_if_busy(run, Slurm())
    except SlurmError as error:
        if error.transient:
            raise
        print(f"Slurm cannot be asked whether a job of this run is in its queue: {error}", file=sys.stderr)
