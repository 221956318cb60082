"""AdamW on host tensors in one pass over memory: the compiled kernel, or torch operations where there is no compiler.

The kernel reads master, moments and an FP32, BF16 or FP16 gradient once, folds unscaling and clipping in, and writes
master, moments and weight. Its results are those of :func:`~pretrain.optim.offload.arithmetic.adamw_`, bit for bit, on
every level (AVX-512, AVX2, scalar), with any number of threads and however the tensors are cut.
"""

from __future__ import annotations

import ctypes
import dataclasses

import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import StepScalars, adamw_, check_tensors
from pretrain.optim.offload.kernel_build import kernel

LEVELS = ("scalar", "avx2", "avx512")
"""Levels of the compiled kernel by their number, each needing a newer processor than the one before."""

TORCH_LEVEL = "torch"
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_WEIGHT = 3


def kernel_level() -> str:
    """What :func:`cpu_adamw_` runs on this machine: ``avx512``, ``avx2``, ``scalar``, or ``torch`` (not compiled)."""
    library = kernel()
    return TORCH_LEVEL if library is None else LEVELS[library.adamw_best_level()]


def cpu_adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    scalars: StepScalars,
    *,
    threads: int | None = None,
    level: str | None = None,
) -> None:
    """One step in place on host tensors; the contract of :func:`~pretrain.optim.offload.arithmetic.adamw_`.

    ``threads`` is torch's number of threads when None. ``level`` forces one of :data:`LEVELS` or ``torch``. The Python
    lock is released while the kernel runs. The tensors must not overlap.

    Raises ``ValueError`` for tensors that do not fit, a tensor on another device, and a level that this machine lacks.
    """
    check_tensors(master, exp_avg, exp_avg_sq, gradient, weight)
    if master.device.type != "cpu":
        raise ValueError(f"the tensors are on {master.device}: this update is for host memory")
    if threads is not None and threads < 1:
        raise ValueError(f"threads = {threads}: expected at least 1")
    library = kernel() if level != TORCH_LEVEL else None
    if level not in (None, TORCH_LEVEL, *LEVELS):
        raise ValueError(f"level = {level!r}: expected one of {', '.join((*LEVELS, TORCH_LEVEL))}")
    if library is None:
        if level in LEVELS:
            raise ValueError(f"level = {level!r}, but the kernel could not be built here; the only level is 'torch'")
        adamw_(master, exp_avg, exp_avg_sq, gradient, weight, scalars)
        return
    best = library.adamw_best_level()
    number = best if level is None else LEVELS.index(level)
    if number > best:
        raise ValueError(f"level = {level!r}: this processor's highest is {LEVELS[best]!r}")
    status = library.adamw_step(
        number,
        threads or torch.get_num_threads(),
        master.numel(),
        gradient.data_ptr(),
        _KINDS[gradient.dtype],
        master.data_ptr(),
        int(master.dtype == torch.int16),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        None if weight is None else weight.data_ptr(),
        _NO_WEIGHT if weight is None else _KINDS[weight.dtype],
        (ctypes.c_float * 9)(*dataclasses.astuple(scalars)),
    )
    if status != 0:
        raise RuntimeError(f"the compiled AdamW refused its arguments (status {status}): library and module differ")
