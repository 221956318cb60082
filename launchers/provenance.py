"""What a run was made with: interpreter, package versions, host, git state. Imports no heavy package."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.tracking.run_files import redact_url

PACKAGES = (
    *("pretrain", "torch", "numpy", "deepspeed", "megatron-core", "hydra-core", "omegaconf", "webdataset"),
    *("tokenizers", "safetensors", "transformers", "xxhash", "mlflow", "mlflow-skinny", "triton"),
    *("mamba-ssm", "causal-conv1d", "flash-attn", "flash-linear-attention"),
)

# Variables that change what a run computes or how it starts. Anything that looks like a credential is left
# out.
_KEPT = re.compile(
    r"^(OMP_|MKL_|OPENBLAS_|KMP_|CUDA_|NVIDIA_|NCCL_|GLOO_|TORCH_|PYTORCH_|DS_|SLURM_|PRETRAIN_|MLFLOW_|HYDRA_"
    r"|LD_|PYTHON|MASTER_ADDR$|MASTER_PORT$|VIRTUAL_ENV$|CONDA_PREFIX$)"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH", re.IGNORECASE)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that matter, by distribution name."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def usable_cpus() -> int:
    """Cores this process may run on (its affinity mask, which Slurm and containers narrow)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Interpreter, versions, host, core count and selected environment variables without credentials."""
    variables = {
        name: redact_url(value)
        for name, value in sorted(os.environ.items())
        if _KEPT.match(name) and not _SECRET.search(name)
    }
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": usable_cpus(),
        "versions": package_versions(),
        "variables": variables,
    }


def _git(folder: Path, *arguments: str) -> str:
    """Output of one git command. Raises OSError (no git) or SubprocessError (refused, too slow)."""
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        timeout=60,
        check=True,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.decode("utf-8", errors="replace")


def git_state(folder: Path) -> tuple[dict[str, Any], str]:
    """Revision, dirty flag and untracked names of ``folder``'s repository, and its diff against HEAD.

    Without git or a repository the revision is None and ``reason`` says why; this is no error.
    """
    try:
        top = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
        revision = _git(top, "rev-parse", "HEAD").strip()
        diff = _git(top, "diff", "--binary", "--no-color", "--no-ext-diff", "HEAD")
        untracked = [name for name in _git(top, "ls-files", "--others", "--exclude-standard", "-z").split("\0") if name]
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode("utf-8", errors="replace").strip().split("\n")[0]
        return {"revision": None, "dirty": None, "reason": reason}, ""
    except (OSError, subprocess.SubprocessError) as error:
        return {"revision": None, "dirty": None, "reason": str(error)}, ""
    state: dict[str, Any] = {"revision": revision, "dirty": bool(diff or untracked), "repository": str(top)}
    if untracked:
        state["untracked"] = untracked[:1000]
    return state, diff
