"""Large page-locked host memory, registered with the driver rather than taken from torch's pinned allocator.

That allocator rounds every block up to a power of two (pytorch/pytorch#95823), up to twice what was asked for, and
keeps what is freed. Here ordinary memory of the size asked for, in huge pages where the kernel grants them, is
registered, and unregistered when the last view of it is gone. Forked processes (workers of a data loader) do not have
it: copied on write, its pages would be the process's own no longer, while the GPU still uses them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def registered_memory(
    num_bytes: int, register: Callable[[int, int], bool], unregister: Callable[[int], None]
) -> Tensor | None:
    """uint8 ``[num_bytes]`` (at least 1) of zeros, aligned to pages.

    Args:
        register: is given address and bytes, tells whether it worked.
        unregister: is given the address, before the memory goes.

    Returns:
        None where registering did not work: the memory is given back.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            with suppress(OSError):  # a kernel without it
                memory.madvise(getattr(mmap, advice))
    exporter = weak_buffer(memory)
    address = ctypes.addressof(exporter)
    if not register(address, num_bytes):
        return None
    # The tensor holds the exporter and that holds the mapping: this comes before the memory is unmapped. At the end of
    # the process the driver does it by itself.
    weakref.finalize(exporter, _by_owner, os.getpid(), unregister, address).atexit = False
    return torch.frombuffer(exporter, dtype=torch.uint8)


def _by_owner(owner: int, unregister: Callable[[int], None], address: int) -> None:
    if os.getpid() == owner:  # a forked process has neither the memory nor the driver
        unregister(address)


def weak_buffer(memory: mmap.mmap | bytearray) -> Any:
    """All of ``memory`` as an array of bytes that takes weak references, and that keeps it."""

    # Only where their class was made by a class statement do arrays of ctypes take them.
    class Buffer(ctypes.Array):
        _type_ = ctypes.c_uint8
        _length_ = len(memory)

    return Buffer.from_buffer(memory)
