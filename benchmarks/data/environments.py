"""Environments of rivals whose pins conflict with the project's.

Each is a ``venv`` without pip whose site-packages hold the rival and what it pins, and a ``.pth`` file that appends the
project's site-packages. What is not pinned differently (torch above all) is taken from there, so that an environment
costs megabytes, not gigabytes, and every contender runs the same torch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from registry import ENVIRONMENTS


def python_of(work: Path, environment: str) -> Path:
    """Interpreter of ``environment``, created on the first call.

    Raises CalledProcessError when a package cannot be installed; nothing half-made stays behind.
    """
    if environment == "project":
        return Path(sys.executable)
    folder = work / "venvs" / environment
    done, python = folder / "installed", folder / "bin" / "python"
    packages = ENVIRONMENTS[environment].packages
    if not done.exists() or done.read_text().split() != list(packages):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        inside = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        answer = subprocess.run([str(python), *inside], check=True, capture_output=True, text=True)
        layer = Path(answer.stdout.strip()) / "project.pth"
        layer.write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *packages], check=True, capture_output=True, text=True)
        done.write_text("\n".join(packages))
    return python


def installed_version(python: Path, package: str) -> str:
    """Version of ``package`` as ``python`` sees it; "not installed" when it is absent."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return answer.stdout.strip() or "not installed"
