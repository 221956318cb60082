"""Slurm's commands behind typed functions: text formats that every release prints alike, errors with a way out.

Times are unix seconds: the commands run with ``SLURM_TIME_FORMAT=%s``. Nothing here asks for ``--json``, whose schema
differs from release to release. All functions raise :class:`SlurmError`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from launchers.slurm.records import (
    FINAL_STATES,
    JobInfo,
    NodeInfo,
    PartitionInfo,
    exit_of,
    known,
    leading_integer,
    parse_job,
    parse_node,
    parse_partition,
    parse_time,
)
from pretrain.config.durations import parse_duration

__all__ = [
    "FINAL_STATES",
    "JobInfo",
    "NodeInfo",
    "PartitionInfo",
    "Slurm",
    "SlurmError",
    "SlurmMissingError",
    "parse_duration",
    "parse_job",
    "parse_node",
    "parse_partition",
    "parse_time",
]

_TRANSIENT = ("contact slurm controller", "Socket timed out", "Zero Bytes were transmitted", "try again", "timed out")
_WAYS_OUT: tuple[tuple[str, str], ...] = (
    # Words of Slurm's message (any case), what to do.
    ("invalid account", "set cluster.account to one of yours (`sacctmgr show associations user=$USER`)"),
    ("account/partition", "cluster.account, cluster.partition and cluster.qos do not go together for you"),
    ("invalid partition", "set cluster.partition to one that `sinfo -s` lists"),
    ("user's group not permitted", "choose another cluster.partition (`sinfo -s`), or ask the site to admit you"),
    ("invalid qos", "set cluster.qos to one that `sacctmgr show qos` lists for your account"),
    ("generic resource", "correct cluster.gres (`sinfo -o '%P %G'` lists what nodes offer)"),
    ("memory specification", "lower cluster.memory_per_node (`sinfo -o '%P %m'` lists MB of a node)"),
    ("node configuration is not available", "lower launcher.num_nodes, cluster.gres or cluster.memory_per_node"),
    ("node count specification", "lower launcher.num_nodes (`sinfo -s` counts the nodes of each partition)"),
    ("more processors requested", "lower launcher.num_processes or launcher.threads_per_process"),
    ("feature specification", "correct cluster.constraint (`sinfo -o '%P %f'` lists features)"),
    ("reservation", "correct cluster.reservation (`scontrol show reservation`)"),
    ("invalid node name", "correct cluster.exclude (`sinfo -N` lists the nodes)"),
    ("time limit", "lower launcher.time_limit (`sinfo -o '%P %l'` lists the longest)"),
    ("--time specification", "give launcher.time_limit as minutes, HH:MM:SS or D-HH:MM:SS"),
    ("unrecognized option", "correct cluster.sbatch_options (`sbatch --help`)"),
    ("access/permission denied", "ask the job's owner, or the site to admit you"),
    (
        "contact slurm controller",
        "is this a login node of the cluster, and is its controller up? `scontrol ping` tells",
    ),
    ("munge", "the authentication service munge does not answer on this machine: ask the site"),
    ("invalid job id", "Slurm no longer knows the job: it ended a while ago, or belongs to another cluster"),
    ("configuration file", "Slurm is not set up on this machine: run this on a login node, or set SLURM_CONF"),
)


class SlurmError(ValueError):
    """A command of Slurm failed. ``transient`` tells that the controller did not answer: the same may work later."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class SlurmMissingError(SlurmError):
    """A command of Slurm is not installed on this machine."""


class Slurm:
    """The cluster that Slurm's commands on this machine talk to.

    Args:
        environment: of the commands (default: this process's).
        timeout_s: how long one command may take.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> None:
        self._environment = dict(os.environ if environment is None else environment) | {"SLURM_TIME_FORMAT": "%s"}
        self._timeout_s = timeout_s

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, script: str | Path, options: Sequence[str] = (), *, cwd: str | Path | None = None) -> int:
        """Queues a batch script; ``options`` go before it. Returns the job id."""
        output = self._run("sbatch", "--parsable", *options, str(script), cwd=cwd, drop=_overruling(Path(script)))
        first = output.strip().splitlines()[-1].partition(";")[0] if output.strip() else ""
        if not first.isdigit():
            raise SlurmError(
                f"sbatch printed {output.strip()!r}, expected a job id; look for the job with `squeue --me`",
                transient=True,
            )
        return int(first)

    def test(self, script: str | Path, options: Sequence[str] = (), *, cwd: str | Path | None = None) -> None:
        """Has the controller judge a batch script without queueing it."""
        self._run("sbatch", "--test-only", *options, str(script), cwd=cwd, drop=_overruling(Path(script)))

    def job(self, job: int) -> JobInfo | None:
        """What the controller, or else the accounting, knows of a job; None when both have forgotten it."""
        try:
            return parse_job(self._run("scontrol", "-o", "show", "job", str(job)), self.expand)
        except SlurmMissingError:
            raise
        except SlurmError as error:
            if error.transient or "invalid job id" not in str(error).lower():
                raise
        return self._accounted(job)

    def my_jobs(self) -> list[JobInfo]:
        """This user's jobs in the queue, running ones included."""
        output = self._run("squeue", "-h", "--me", "-o", "%A|%T|%r|%P|%j|%u|%D|%V|%S|%e|%N|%Z")
        jobs = []
        for line in output.splitlines():
            job, state, reason, partition, name, user, count, submit, start, end, nodes, work_dir = line.split("|", 11)
            info = JobInfo(
                job=int(job),
                state=state,
                reason=known(reason) or "",
                nodes=self.expand(nodes) if nodes and state != "PENDING" else (),
                partition=partition,
                name=name,
                user=user,
                num_nodes=leading_integer(count),
                submit_time=parse_time(submit),
                start_time=parse_time(start),
                end_time=parse_time(end),
                work_dir=work_dir,
            )
            jobs.append(info)
        return jobs

    def jobs_of_script(self, script: str | Path) -> list[int]:
        """This user's jobs whose batch script was the file ``script``, as long as the controller knows them."""
        output = self._run("squeue", "-h", "--me", "--states=all", "-o", "%A|%o")
        pairs = (line.partition("|") for line in output.splitlines())
        return sorted({int(job) for job, _, command in pairs if command.strip() == str(script) and job.isdigit()})

    def squeue(self, form: str, jobs: Iterable[str]) -> str:
        """Lines in squeue's format ``form`` about ``jobs``, ended ones too as long as the controller knows them."""
        try:
            return self._run("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", f"--format={form}")
        except SlurmError as error:
            # Of a single job that it has forgotten, squeue speaks as of an error.
            if "invalid job id" in str(error).lower():
                return ""
            raise

    def requeue(self, job: int, exclude: Iterable[str] = ()) -> None:
        """Puts a running job back in the queue, under its id and without the nodes in ``exclude``.

        The batch script is ended by this, the caller included when it runs there: nothing may be left to do.
        """
        excluded = sorted(set(exclude))
        self._run("scontrol", "requeue", str(job))
        # Refused before the requeue, for a job that runs; accepted from the moment that the requeue is.
        if excluded:
            self.update_excluded(job, excluded)

    def update_excluded(self, job: int, exclude: Iterable[str]) -> None:
        """Replaces the list of nodes that a waiting job must not be given."""
        self._run("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(sorted(set(exclude)))}")

    def cancel(self, job: int, number: int | None = None, *, batch: bool = False, only_pending: bool = False) -> None:
        """Ends a job, or sends it signal ``number``: to its steps, with ``batch`` to its batch script alone.

        With ``only_pending`` a job that has started meanwhile is left alone.
        """
        options = [] if number is None else [f"--signal={signal.Signals(number).name.removeprefix('SIG')}"]
        options += ["--batch"] if batch else []
        options += ["--state=PENDING"] if only_pending else []
        self._run("scancel", *options, str(job))

    def step(self, job: int, name: str) -> str | None:
        """Id (``123.4``) of the running step that srun started under ``name`` (``srun --job-name``), None without."""
        for line in self._run("squeue", "-h", "-s", "-j", str(job), "-o", "%i|%j").splitlines():
            step, _, found = line.partition("|")
            if found == name:
                return step
        return None

    def signal_step(self, step: str, number: int) -> None:
        """Signal to every process of a step. srun itself is no way: it turns SIGTERM into SIGKILL for its tasks."""
        self._run("scancel", f"--signal={signal.Signals(number).name.removeprefix('SIG')}", step)

    def _accounted(self, job: int) -> JobInfo | None:
        names = "JobIDRaw,State,Partition,JobName,User,NNodes,Submit,Start,End,NodeList,ExitCode"
        try:
            output = self._run("sacct", "-X", "-P", "-n", "-j", str(job), f"--format={names}")
        except SlurmError:
            return None  # no accounting here
        lines = [line for line in output.splitlines() if line.count("|") >= 10]
        if not lines:
            return None
        number, state, partition, name, user, count, submit, start, end, nodes, code = lines[-1].split("|", 10)
        exit_code, exit_signal = exit_of(code)
        return JobInfo(
            job=int(number),
            state=state.split()[0],  # "CANCELLED by 1000"
            reason="",
            nodes=self.expand(nodes) if known(nodes) and nodes != "None assigned" else (),
            partition=partition,
            name=name,
            user=user,
            num_nodes=leading_integer(count),
            submit_time=parse_time(submit),
            start_time=parse_time(start),
            end_time=parse_time(end),
            exit_code=exit_code,
            exit_signal=exit_signal,
        )

    # ---- the cluster -------------------------------------------------------------------------------------------------

    def nodes(self, names: Iterable[str] | None = None) -> dict[str, NodeInfo]:
        """Nodes by name: those in ``names``, or all. Names that Slurm does not know are left out."""
        chosen = [",".join(names)] if names is not None else []
        if chosen == [""]:
            return {}
        output = self._run("scontrol", "-o", "show", "node", *chosen, accepted=(0, 1))
        infos = [parse_node(line) for line in output.splitlines() if line.startswith("NodeName=")]
        return {info.name: info for info in infos}

    def partitions(self) -> dict[str, PartitionInfo]:
        """Partitions by name."""
        output = self._run("scontrol", "-o", "show", "partition", accepted=(0,))
        infos = [parse_partition(line, self.expand) for line in output.splitlines() if "PartitionName=" in line]
        return {info.name: info for info in infos}

    def config(self) -> dict[str, str]:
        """The controller's settings: KillWait, JobRequeue, RequeueExit, PreemptMode, ..."""
        pairs = (line.partition("=") for line in self._run("scontrol", "show", "config").splitlines())
        return {name.strip(): value.strip() for name, sign, value in pairs if sign}

    def associations(self) -> list[tuple[str, str, tuple[str, ...]]] | None:
        """(account, partition or "", QOS) that this user may use; None where there is no accounting to ask."""
        import getpass

        chosen = ["show", "assoc", f"user={getpass.getuser()}", "format=Account,Partition,QOS"]
        try:
            output = self._run("sacctmgr", "-n", "-P", *chosen)
        except SlurmError:
            return None
        rows = [line.split("|") for line in output.splitlines() if line.count("|") >= 2]
        return [(account, partition, tuple(filter(None, qos.split(",")))) for account, partition, qos, *_ in rows]

    def expand(self, names: str) -> tuple[str, ...]:
        """``node[1-3]`` -> node1, node2, node3, in Slurm's order (which is that of ranks)."""
        if not re.search(r"[\[,]", names):
            return (names,) if known(names) else ()
        return tuple(self._run("scontrol", "show", "hostnames", names).split())

    def version(self) -> str:
        """Such as ``22.05.8``."""
        return self._run("sbatch", "--version").split()[-1]

    # ---- running -----------------------------------------------------------------------------------------------------

    def _run(
        self,
        program: str,
        *arguments: str,
        cwd: str | Path | None = None,
        drop: tuple[str, ...] = (),
        accepted: tuple[int, ...] = (0,),
    ) -> str:
        environment = {
            name: value
            for name, value in self._environment.items()
            if name not in drop and not (program == "sbatch" and _is_of_job(name))
        }
        shown = " ".join([program, *arguments])
        try:
            result = subprocess.run(
                [program, *arguments],
                env=environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            if cwd is not None and not os.path.isdir(cwd):
                raise SlurmError(f"{shown}: the folder {cwd} does not exist") from error
            raise SlurmMissingError(
                f"{program}: no such command here; Slurm is not installed on this machine or not on PATH. Run this on "
                "a login node of the cluster (perhaps after `module load slurm`), or train on this machine with "
                "launcher=local"
            ) from error
        except PermissionError as error:
            raise SlurmError(
                f"{program}: you may not run this command here ({error.strerror}); ask the site"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise SlurmError(
                f"{shown}: no answer within {self._timeout_s:g} s; the controller is down or overloaded "
                "(`scontrol ping`): try again later",
                transient=True,
            ) from error
        if result.returncode not in accepted:
            raise _failure(shown, result.returncode, result.stderr.strip() or result.stdout.strip())
        return result.stdout


_NEVER = ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE", "SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_TEST_ONLY")
"""Variables that change what a submission is: whether the job comes back, how many jobs it is, when sbatch returns."""
_ENVIRONMENT_NAMES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE"}


def _overruling(script: Path) -> tuple[str, ...]:
    """Variables that would overrule ``#SBATCH`` lines of the script, which are what its user was shown."""
    try:
        lines = script.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()  # sbatch says it better
    found = (match.group(1) for line in lines if (match := re.match(r"#SBATCH\s+--([a-z-]+)", line)))
    return (*_NEVER, *(f"SBATCH_{_ENVIRONMENT_NAMES.get(name, name.upper().replace('-', '_'))}" for name in found))


def _is_of_job(name: str) -> bool:
    """Variables of a job that submits another one from within: the new job is to get its own."""
    return name.startswith("SLURM_") and name not in ("SLURM_CONF", "SLURM_CLUSTERS")


def _failure(command: str, code: int, said: str) -> SlurmError:
    lowered = said.lower()
    ways = [way for words, way in _WAYS_OUT if words in lowered]
    lines = "; ".join(dict.fromkeys(_unadorned(line) for line in said.splitlines() if line.strip()))
    ending = f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    return SlurmError(
        f"`{command}` {ending}: {lines or 'no message'}" + (f". What to do: {ways[0]}" if ways else ""),
        # Killed: a job that ends takes the commands that it runs along, and says nothing about what they asked.
        transient=code < 0 or any(words.lower() in lowered for words in _TRANSIENT),
    )


def _unadorned(line: str) -> str:
    """``sbatch: error: Batch job submission failed: Invalid ...`` without the program's name."""
    return re.sub(r"^\w+: (error|fatal): ", "", line.strip())
