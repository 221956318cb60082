"""Whether optimizer state fits in host memory, judged before any of it is allocated. Torch-free."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Mapping
from pathlib import Path

from pretrain.optim.offload.constants import Widths
from pretrain.parallel.control_groups import memory_room

_CAP_IPC_LOCK = 14
_GIB = 2**30
_SMALLER = (
    "keep state on the device: a larger optimizer.offload.resident_fraction",
    "optimizer.offload.master=low_bits, which saves 2 bytes for each element with train.precision=bf16",
    "a larger optimizer.offload.fraction or a smaller subgroup_size, for fewer and smaller buffers",
    "more ranks or nodes, each of which holds a smaller share of the state",
)
_PINNING = (
    "a higher limit of locked memory (ulimit -l unlimited; under Slurm PropagateResourceLimitsExcept=MEMLOCK; in a"
    " container --ulimit memlock=-1)"
)


def widths_of(precision: str, master: str) -> Widths:
    """Bytes per element for weights of ``train.precision`` and ``optimizer.offload.master``; both engines sum gradients
    in FP32. FP32 weights are their own master."""
    if precision == "fp32":
        return Widths(state=8, gradient=4, weight=4, weight_down=True)
    if master == "low_bits":
        return Widths(state=10, gradient=4, weight=2, weight_down=True)
    return Widths(state=12, gradient=4, weight=2, weight_down=False)


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that this process may still take: the least of what is free on the host, what its control
    groups leave (caches of files count as free in both) and its limit of address space (``ulimit -v``). None where none
    of them is known."""
    return _least(_shared_room(root), _free_addresses(root))


def pinned_limit_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may pin, None where nothing limits it.

    The limit is ``RLIMIT_MEMLOCK`` (``ulimit -l``), unless the process may lock at will (CAP_IPC_LOCK) or the memory is
    pinned by NVIDIA's kernel driver, which does not count it (``os_lock_user_pages`` in open-gpu-kernel-modules,
    kernel-open/nvidia/os-mlock.c). It is often only some MiB.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or (root / "proc/driver/nvidia/version").exists():
        return None
    capabilities = _status(root, "CapEff")
    if capabilities is not None and int(capabilities, 16) >> _CAP_IPC_LOCK & 1:
        return None
    return limit


def require_host_memory(
    needed: Mapping[str, int],
    *,
    limit_gib: float | None,
    ranks_on_host: int,
    pinned: bool,
    root: Path = Path("/"),
) -> None:
    """Refuse what does not fit, before it is allocated.

    What is free is shared with the other ranks of the host: all of them must have called this before the first of them
    allocates.

    Args:
        needed: bytes that one rank will allocate, by what they hold.
        limit_gib: ``optimizer.offload.host_memory_gib``, GiB that one rank may take; None: no limit of its own.
        ranks_on_host: ranks that allocate as much on this host.
        pinned: the memory will be pinned.
        root: of the file system that tells what is there.

    Raises:
        ValueError: it does not fit; with a table of what is needed, what is there, and what to do.
    """
    total = sum(needed.values())
    faults: list[tuple[str, str]] = []  # what is too small, and how to make it larger

    def compare(wanted: int, there: float | None, found: str, way: str) -> None:
        if there is not None and wanted > there:
            # Rounded up, so that a little too little does not look like enough.
            short = math.ceil((wanted - there) / _GIB * 1000) / 1000
            faults.append((f"{found.format(_gib(there))}, {short:,.3f} GiB too little", way))

    allowed = None if limit_gib is None else limit_gib * _GIB
    whom = f"{ranks_on_host} ranks on this host together" if ranks_on_host > 1 else "this rank"
    name = "optimizer.offload.host_memory_gib"
    compare(total, allowed, f"{name} allows a rank {{}}", f"a larger {name}")
    more = "more memory for the job, or fewer ranks on a host"
    compare(total * ranks_on_host, _shared_room(root), f"{{}} are free for {whom}", more)
    compare(total, _free_addresses(root), "a process here may map {} more (ulimit -v)", "ulimit -v unlimited")
    if pinned:
        compare(total, pinned_limit_bytes(root), "a process here may pin {} (ulimit -l)", _PINNING)
    if not faults:
        return
    rows = [(name, size) for name, size in needed.items() if size]
    rows.append(("one rank", total))
    if ranks_on_host > 1:
        rows.append((f"{ranks_on_host} ranks on this host", total * ranks_on_host))
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {_gib(size):>14}" for name, size in rows)
    # Without a device resident state lies in host memory too, and nothing is pinned.
    smaller = _SMALLER if pinned else _SMALLER[1:]
    ways = "; or\n  ".join([*smaller, *(way for _, way in faults)])
    raise ValueError(
        "optimizer.offload needs more host memory than there is (nothing has been allocated):\n"
        f"{table}\n" + "\n".join(f"Found: {text}." for text, _ in faults) + f"\nWhat to do: {ways}."
    )


def _shared_room(root: Path) -> int | None:
    """What is left for all processes of this job on this host together."""
    return _least(_free_on_host(root), memory_room(root))


def _least(*rooms: int | None) -> int | None:
    return min((room for room in rooms if room is not None), default=None)


def _free_on_host(root: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return None


def _free_addresses(root: Path) -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used = _status(root, "VmSize")
    return max(limit - int(used.split()[0]) * 1024, 0) if used is not None else limit


def _status(root: Path, name: str) -> str | None:
    """A field of this process's status file."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/status").read_text().splitlines():
            found, _, value = line.partition(":")
            if found == name:
                return value.strip()
    return None


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:,.3f} GiB"
