"""Submitting a run to Slurm and saying what was done, or would be. Shared by ``run`` and ``resume``."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from launchers.slurm.submit import Kind
    from pretrain.config.schema import Config

_TRACKING_PATIENCE_S = 10.0


def check_submittable(config: Config, run_path: Path) -> None:
    """What can be known before a run directory is made: Slurm is there, the template renders. Raises ValueError."""
    import shutil

    from launchers.slurm.commands import Slurm
    from launchers.slurm.submit import prepare

    prepare(config, run_path)
    if shutil.which("sbatch") is None:
        Slurm().version()  # says what is missing, and the way out


def planned_path(config: Config, run_dir: str | None) -> Path:
    """Where the run directory would be; a new one gets the time of its making."""
    if run_dir is not None:
        return Path(run_dir).absolute()
    return Path(config.run.root).absolute() / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def submit_run(run: RunDir, config: Config, kind: Kind) -> int:
    """Queue the run and print job, files and what to call next. Returns the command's exit code."""
    from launchers.exit_codes import ExitCode
    from launchers.slurm.submit import job_log_path, latest_script, submit
    from pretrain.commands.launch import program, shown
    from pretrain.tracking.sync import deliver, tracking_link

    job = submit(run, config, kind)
    _note_command(run, job)
    path = shown(run.path)
    lines = [
        f"run directory {path}",
        f"job {job} queued: {resources(config)}",
        f"  script    {shown(latest_script(run.path))}",
        f"  job log   {shown(job_log_path(run.path, job))}",
        f"  rank logs {shown(run.logs_path)}/attempt_*/rank_*.log",
    ]
    print("\n".join(lines), flush=True)
    if config.tracking.enabled:
        # The job is queued whatever comes of this: MLflow shows the run as scheduled from now on.
        deliver(run.path, timeout_s=_TRACKING_PATIENCE_S)
        print(f"  tracking  {tracking_link(run.path)}, experiment {config.tracking.experiment}")
    print(f"Next: {program()} status {path} | logs {path} -f | cancel {path}", flush=True)
    return ExitCode.FINISHED


def show_plan(config: Config, run_path: Path, kind: Kind = "first") -> None:
    """What would be done, and with Slurm the script that would be queued; nothing is written."""
    from launchers.slurm.script import TemplateError
    from launchers.slurm.submit import prepare, signal_lead_s
    from pretrain.commands.launch import shown
    from pretrain.config.launch_schema import SlurmConfig
    from pretrain.config.layout import data_parallel_size, model_parallel_size

    train, launcher = config.train, config.launcher
    data = data_parallel_size(config)
    micro_batches = train.global_batch_size // (train.micro_batch_size * data)
    rows = [
        ("run directory", shown(run_path)),
        (
            "ranks",
            f"{launcher.num_processes} = {data} data parallel x {model_parallel_size(config.engine)} model parallel",
        ),
        (
            "a step",
            f"{train.global_batch_size} samples = {data} x {micro_batches} micro-batches of {train.micro_batch_size}",
        ),
        ("steps", f"{train.steps}, checkpoint every {train.checkpoint_interval or 'end only'}"),
        ("engine", config.engine.name),
    ]
    if isinstance(launcher, SlurmConfig):
        notice = signal_lead_s(config, run_path)
        rows += [
            ("job", resources(config)),
            ("last save", f"Slurm signals {notice} s before the end; the run saves and is queued again"),
            ("restarts", f"{launcher.max_restarts} at most, by {launcher.requeue_by}"),
        ]
    else:
        rows.append(("launcher", f"{launcher.name}: {launcher.num_processes} process(es) on this machine"))
    print("plan")
    for name, text in rows:
        print(f"  {name:<14} {text}")
    if isinstance(launcher, SlurmConfig):
        try:
            script = prepare(config, run_path, kind=kind)
            print(f"\nbatch script, from {shown(script.template.path)}\n")
            print("\n".join(f"  {line}".rstrip() for line in script.text.splitlines()))
        except TemplateError:
            print("\nThere is no batch script: its template has a fault, which is among the findings of preflight.")
    print("\nNothing was written or submitted.", flush=True)


def resources(config: Config) -> str:
    """``2 nodes x 2 ranks, partition low, at most 01:00:00``."""
    from pretrain.config.launch_schema import SlurmConfig

    launcher, cluster = config.launcher, config.cluster
    assert isinstance(launcher, SlurmConfig)
    least = f"{launcher.min_nodes}-" if launcher.min_nodes not in (None, launcher.num_nodes) else ""
    parts = [f"{least}{launcher.num_nodes} node(s) x {launcher.processes_per_node} rank(s)"]
    parts += [
        f"{name} {value}" for name in ("partition", "account", "qos", "gres") if (value := getattr(cluster, name))
    ]
    return ", ".join([*parts, f"at most {launcher.time_limit} a job"])


def _note_command(run: RunDir, job: int) -> None:
    words = shlex.join(["pretrain", *sys.argv[1:]])
    with contextlib.suppress(OSError), open(run.path / "command.txt", "a", encoding="utf-8") as stream:
        stream.write(f"# job {job}, {time.strftime('%Y-%m-%d %H:%M:%S%z')}, in {os.getcwd()}\n{words}\n")
