"""Peaks of a device's memory for two readers: one that wants the highest ever, one that wants it phase by phase.

torch keeps one peak for each device; resetting it for a phase would take it from whoever wants that of the whole run.
"""

from __future__ import annotations

import torch

_highest: dict[int, int] = {}


def peak_bytes(device: torch.device) -> int:
    """Most bytes that tensors took on a CUDA device since this process began."""
    return max(_highest.get(_number(device), 0), torch.cuda.max_memory_allocated(device))


def lap_peak_bytes(device: torch.device) -> int:
    """Most bytes that tensors took on a CUDA device since this was called last."""
    peak = torch.cuda.max_memory_allocated(device)
    _highest[_number(device)] = max(_highest.get(_number(device), 0), peak)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
