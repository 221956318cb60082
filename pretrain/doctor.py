"""``pretrain doctor``: what this machine offers for pretraining, and what is missing for what."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "missing"]
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``required`` marks what training on this machine cannot do without."""

    area: str
    item: str
    status: Status
    detail: str
    needed_for: str
    required: bool = False


def report(store: Path = Path("mlruns"), folder: Path = Path(".")) -> list[Finding]:
    """Looks at devices, packages, Slurm, tracking and storage; takes seconds, as it imports torch.

    ``store`` is the folder of the embedded MLflow store and ``folder`` the one that receives runs. A probe
    that fails becomes a finding; this raises nothing.
    """
    probes: list[Callable[[], Iterator[Finding]]] = [
        _machine,
        _torch,
        _packages,
        _megatron,
        _kernels,
        _slurm,
        lambda: _tracking(store),
        lambda: _storage(folder),
    ]
    findings: list[Finding] = []
    for probe in probes:
        try:
            findings.extend(probe())
        except Exception as error:  # a broken driver or package is what this command is for
            name = getattr(probe, "__name__", "probe").strip("_")
            findings.append(Finding(name, "probe", "warn", f"{type(error).__name__}: {error}", "this report"))
    return findings


def can_train(findings: list[Finding]) -> bool:
    """Whether everything that local training needs is there."""
    return not any(finding.required and finding.status == "missing" for finding in findings)


def _machine() -> Iterator[Finding]:
    import psutil

    supported = sys.version_info >= (3, 11)
    yield Finding(
        "machine",
        "Python",
        "ok" if supported else "missing",
        platform.python_version(),
        "everything",
        required=True,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("machine", "CPU cores", "ok" if cores >= 2 else "warn", f"{cores} usable", "one or more per rank")
    memory = psutil.virtual_memory()
    free = memory.available / GIB
    detail = f"{free:.1f} of {memory.total / GIB:.1f} GiB available"
    yield Finding("machine", "memory", "ok" if free >= 3 else "warn", detail, "two ranks of the demo take about 3 GiB")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a wheel for another CUDA fails with OSError
        yield Finding("torch", "torch", "missing", f"does not import: {error}", "training", required=True)
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", "torch", "ok", f"{torch.__version__} ({build})", "training", required=True)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus == 0:
        hint = "none"
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            hint = "a driver is installed, but this torch is a CPU build: install a CUDA build"
        yield Finding("torch", "GPUs", "missing", hint, "training at scale (the CPU path needs none)")
    for index in range(num_gpus):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / GIB:.0f}/{total / GIB:.0f} GiB free"
        detail = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        yield Finding("torch", f"GPU {index}", "ok", detail, "training at scale")
    distributed = torch.distributed.is_available()
    gloo = distributed and torch.distributed.is_gloo_available()
    yield Finding(
        "torch", "gloo", "ok" if gloo else "missing", "built in" if gloo else "not built in", "ranks on CPU",
        required=num_gpus == 0,
    )  # fmt: skip
    nccl = distributed and torch.distributed.is_nccl_available()
    if nccl:
        version = ".".join(map(str, torch.cuda.nccl.version())) if num_gpus else "built in"
        yield Finding("torch", "NCCL", "ok", version, "ranks on GPUs", required=num_gpus > 0)
    else:
        yield Finding("torch", "NCCL", "missing", "not built in", "ranks on GPUs", required=num_gpus > 0)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    for name, needed_for, required in (
        ("deepspeed", "the DeepSpeed engine", True),
        ("hydra-core", "composing configurations", True),
        ("tokenizers", "preparing text", True),
        ("safetensors", "checkpoints", True),
        ("mlflow", "tracking (metrics.jsonl is written without it)", False),
        ("matplotlib", "the loss-curve picture", True),
        ("transformers", "the tests: an independent Mamba-2 to compare with", False),
    ):
        version = _version(name)
        yield Finding(
            "packages", name, "ok" if version else "missing", version or "not installed", needed_for, required
        )


def _megatron() -> Iterator[Finding]:
    """Looks at the version alone: importing Megatron-Core takes seconds."""
    import torch

    from pretrain.parallel.megatron_import import KNOWN_VERSIONS

    status: Status
    version, known = _version("megatron-core"), " or ".join(KNOWN_VERSIONS)
    is_known = version in KNOWN_VERSIONS
    if version is None:
        status, detail = "missing", f"not installed; this release works with {known}"
    elif is_known:
        status, detail = "ok", version
    else:
        status, detail = (
            "warn",
            f"{version}, which this release does not know: it refuses engine=megatron; known: {known}",
        )
    yield Finding("Megatron", "megatron-core", status, detail, "engine=megatron (DeepSpeed needs none of it)")
    needed_for = "engine=megatron with ranks on CPU"
    if torch.cuda.is_available():
        yield Finding("Megatron", "CPU adaptation", "ok", "not used: CUDA is here", needed_for)
    elif is_known:
        yield Finding("Megatron", "CPU adaptation", "ok", f"made for {version}", needed_for)
    else:
        yield Finding("Megatron", "CPU adaptation", "missing", f"needs megatron-core {known}", needed_for)


def _kernels() -> Iterator[Finding]:
    """Libraries with GPU kernels, and which of them (or torch) computes each operation of a model on a GPU."""
    for distribution, module, needed_for in (
        ("mamba-ssm", "mamba_ssm", "fast Mamba and Mamba-2 on GPU"),
        ("causal-conv1d", "causal_conv1d", "the convolution of Mamba layers on GPU"),
        ("flash-attn", "flash_attn", "packed attention on GPU; torch's own kernels serve without it"),
        ("flash-linear-attention", "fla", "Mamba-2 on GPU where mamba-ssm is not installed"),
        ("triton", "triton", "torch.compile and the kernel packages above"),
    ):
        version = _version(distribution)
        if version is None or find_spec(module) is None:
            yield Finding("GPU kernels", distribution, "missing", "not installed", needed_for)
        else:
            yield Finding("GPU kernels", distribution, "ok", version, needed_for)
    yield from _back_ends()


def _back_ends() -> Iterator[Finding]:
    import torch

    from pretrain.ops.backends import VARIABLE, choices

    needed_for = f"{VARIABLE} chooses another: auto, torch, mamba_ssm, fla"
    if not torch.cuda.is_available():
        wanted = os.environ.get(VARIABLE) or "auto"
        if wanted in ("auto", "torch"):
            yield Finding("back ends", "state spaces", "ok", "torch: there is no GPU here", needed_for)
        else:
            detail = f"{VARIABLE}={wanted}, but there is no GPU here: models with Mamba layers will refuse to run"
            yield Finding("back ends", "state spaces", "warn", detail, needed_for)
        yield _attention_ways()
        return
    try:
        found = choices()
    except ValueError as error:
        yield Finding("back ends", VARIABLE, "warn", str(error), needed_for)
        return
    for choice in found:
        yield Finding("back ends", choice.operation, "ok", f"{choice.backend}: {choice.reason}", needed_for)
    yield _attention_ways()


def _attention_ways() -> Finding:
    """The ways of computing attention that this host has; which one a call takes depends on its options."""
    from pretrain.ops.attention import describe_ways

    found = describe_ways()
    ready = [way for way, state in found.items() if state == "available"]
    absent = [f"{way}: {state}" for way, state in found.items() if state != "available"]
    return Finding(
        "back ends", "attention", "ok", ", ".join(ready), "; ".join(absent) or "every combination of options"
    )


def _slurm() -> Iterator[Finding]:
    for command in ("sbatch", "srun", "scontrol"):
        path = shutil.which(command)
        if path is None:
            yield Finding("Slurm", command, "missing", "not on PATH", "submitting to a cluster (planned)")
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5)
            version = (done.stdout or done.stderr).strip().split("\n")[0]
            yield Finding(
                "Slurm", command, "ok" if done.returncode == 0 else "warn", version, "submitting to a cluster (planned)"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            yield Finding("Slurm", command, "warn", f"does not answer: {error}", "submitting to a cluster (planned)")


def _tracking(store: Path) -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(("http://", "https://")):
        from pretrain.tracking.run_files import redact_url

        shown = redact_url(uri)
        try:
            with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=3) as answer:
                detail, status = f"{shown} answers ({answer.status})", "ok"
        except urllib.error.HTTPError as error:
            detail, status = f"{shown} answers {error.code} to /health", "warn"
        except (OSError, ValueError) as error:
            detail, status = f"{shown} does not answer: {getattr(error, 'reason', error)}", "warn"
        yield Finding("tracking", "MLflow server", "ok" if status == "ok" else "warn", detail, "watching runs")
        return
    parent = store.absolute()
    while not parent.exists():
        parent = parent.parent
    writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    detail = f"{store.absolute()} {'writable' if writable else f'not writable ({parent})'}"
    yield Finding("tracking", "MLflow store", "ok" if writable else "warn", detail, "watching runs")


def _storage(folder: Path) -> Iterator[Finding]:
    place = folder.absolute()
    free = shutil.disk_usage(place).free / GIB
    writable = os.access(place, os.W_OK)
    status: Status = "missing" if not writable or free < 0.2 else "ok" if free >= 2 else "warn"
    detail = f"{free:.1f} GiB free in {place}" + ("" if writable else ", not writable")
    yield Finding("storage", "disk", status, detail, "checkpoints: 12 bytes a parameter or more", required=True)
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        status = "ok" if usage.total >= GIB else "warn"
        detail = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
        yield Finding("storage", "/dev/shm", status, detail, "NCCL and data workers; containers often get 64 MB")
    else:
        yield Finding("storage", "/dev/shm", "warn", "not there", "NCCL and data workers")
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        yield Finding("network", "loopback", "ok", "127.0.0.1", "ranks finding each other", required=True)
    except OSError as error:
        yield Finding("network", "loopback", "missing", str(error), "ranks finding each other", required=True)


def show(findings: list[Finding]) -> None:
    """Prints the report as a table, and a verdict."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "missing": "red"}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "", "status", "found", "needed for"):
        table.add_column(heading, overflow="fold")
    area = ""
    for finding in findings:
        # What is missing and not needed for local training is worth knowing, but no alarm.
        style = "dim" if finding.status == "missing" and not finding.required else styles[finding.status]
        table.add_row(
            Text(finding.area if finding.area != area else "", style="bold"),
            finding.item,
            Text(finding.status, style=style),
            Text(finding.detail),
            Text(finding.needed_for, style="dim"),
        )
        area = finding.area
    # Piped output has no width of its own; 80 columns would fold every row.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
    if can_train(findings):
        console.print("\n[green]Training can run on this machine.[/]")
    else:
        names = ", ".join(f.item for f in findings if f.required and f.status == "missing")
        console.print(f"\n[red]Training cannot run on this machine: {names} missing.[/]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--store", type=Path, default=Path("mlruns"), help="folder of the embedded MLflow store")


def run(args: argparse.Namespace) -> int:
    """The verb; returns 0 when training can run here, else 1."""
    findings = report(args.store)
    if args.json:
        result = {"can_train": can_train(findings), "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(result, indent=1))
    else:
        show(findings)
    return 0 if can_train(findings) else 1
