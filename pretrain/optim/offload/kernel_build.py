"""Builds the C++ kernel of the CPU update at first use, and loads it.

The library lies in ``$PRETRAIN_KERNEL_CACHE``, else in ``pretrain`` below ``$XDG_CACHE_HOME`` or ``~/.cache``, else in
a temporary folder; its name holds a hash of source, compiler version, flags and machine, so a change of any of them
builds anew. Any number of processes may build at once: each compiles to a name of its own and renames. Torch-free.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("adamw.cpp")
# Contraction off: a fused multiply-add would round once where the specification rounds twice. Errno and traps are left
# out only so that square roots vectorise; neither changes a result.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-fast-math",
    "-fno-math-errno",
    "-fno-trapping-math",
    # GCC warns of its own AVX-512 headers.
    "-w",
)
COMPILE_SECONDS = 300


class _CompileError(Exception):
    """The compiler ended with an error."""


class KernelUnavailable(RuntimeError):  # noqa: N818 (a state of the machine rather than an error of the caller)
    """No kernel on this machine; the message says why and what to do."""


def find_compiler() -> list[str]:
    """The compiler's command: ``$CXX`` (which may hold arguments), else the first of g++, clang++, c++.

    Raises :class:`KernelUnavailable` when there is none.
    """
    chosen = os.environ.get("CXX", "").split()
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise KernelUnavailable(f"$CXX names {chosen[0]!r}, which is not on the path")
        return chosen
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise KernelUnavailable("no C++ compiler (g++, clang++ or c++) is on the path; install one or set $CXX")


def cache_folders() -> list[Path]:
    """Folders to build in, the first usable one is taken."""
    named = os.environ.get("PRETRAIN_KERNEL_CACHE")
    folders = [Path(named)] if named else []
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no home folder
        folders.append((Path(base) if base else Path.home() / ".cache") / "pretrain")
    folders.append(temporary_folder())
    return folders


def temporary_folder() -> Path:
    """Where the library is built when no cache can be written: this user's own, below the temporary folder."""
    return Path(tempfile.gettempdir()) / f"pretrain-kernels-{os.getuid()}"


def build() -> Path:
    """The path of the compiled library, built when it is not there yet.

    Raises :class:`KernelUnavailable` without a compiler, without a folder to write to, and when compiling fails.
    """
    reasons: list[str] = []
    for library in _libraries(reasons):
        return library
    raise _unusable(reasons)


def _libraries(reasons: list[str]) -> Iterator[Path]:
    """The library in one folder after the other, built where it is not there; why not goes to ``reasons``."""
    compiler = find_compiler()
    name = f"adamw-{_key(compiler)}.so"
    for folder in cache_folders():
        library = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Code is loaded from here: below the shared temporary folder someone else might have put it there.
            if folder == temporary_folder() and folder.stat().st_uid != os.getuid():
                reasons.append(f"{folder}: belongs to another user")
                continue
            if library.is_file():
                yield library
                continue
            with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
                made = Path(scratch) / name
                _compile(compiler, made)
                os.replace(made, library)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
        except _CompileError as error:
            # Whether the folder is at fault (full, over its quota) only another one tells.
            reasons.append(f"{folder}: {error}")
        else:
            yield library


def _unusable(reasons: list[str]) -> KernelUnavailable:
    return KernelUnavailable(f"no folder to build in ({'; '.join(reasons)}); set $PRETRAIN_KERNEL_CACHE to one")


def _key(compiler: list[str]) -> str:
    texts = (*compiler, _version(compiler), *FLAGS, platform.machine())
    parts = [SOURCE.read_bytes(), *(text.encode() for text in texts)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _version(compiler: list[str]) -> str:
    try:
        answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailable(f"the compiler {' '.join(compiler)!r} does not run: {error}") from error
    return answer.stdout


def _compile(compiler: list[str], target: Path) -> None:
    command = [*compiler, *FLAGS, str(SOURCE), "-o", str(target)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailable(f"{' '.join(command)} did not finish: {error}") from error
    if answer.returncode != 0:
        lines = [line for line in answer.stderr.splitlines() if "error" in line] or answer.stderr.splitlines()
        raise _CompileError(f"{' '.join(command)} failed: {' | '.join(lines[:3]) or answer.returncode}")


def load() -> ctypes.CDLL:
    """The library with the types of its functions declared; raises :class:`KernelUnavailable`."""
    reasons: list[str] = []
    for path in _libraries(reasons):
        try:
            library = ctypes.CDLL(str(path))
            break
        except OSError as error:  # damaged, or in a file system from which nothing may be executed
            reasons.append(f"{path} cannot be loaded: {error}; delete it to build it anew")
    else:
        raise _unusable(reasons)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.adamw_best_level.restype = integer
    library.adamw_best_level.argtypes = []
    library.adamw_step.restype = integer
    library.adamw_step.argtypes = [
        integer,  # level
        integer,  # threads
        ctypes.c_int64,  # elements
        pointer,  # gradient
        integer,  # its kind
        pointer,  # master
        integer,  # whether of low bits
        pointer,  # exp_avg
        pointer,  # exp_avg_sq
        pointer,  # weight
        integer,  # its kind
        ctypes.POINTER(ctypes.c_float),  # scalars
    ]
    return library


_loading = threading.Lock()


def kernel() -> ctypes.CDLL | None:
    """The library, loaded once a process; None, with one warning that says why, where it cannot be had."""
    with _loading:
        return _kernel()


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    try:
        return load()
    except KernelUnavailable as reason:
        warnings.warn(
            f"The compiled CPU AdamW is not available: {reason}. The update runs through torch operations instead: the "
            "same bits, several times slower.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None


def forget() -> None:
    """Look for the kernel anew at the next call: after a compiler was installed, or the cache moved."""
    with _loading:
        _kernel.cache_clear()
