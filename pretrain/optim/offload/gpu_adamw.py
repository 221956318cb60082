"""AdamW on CUDA tensors in one Triton kernel, with the bits of the CPU: :mod:`~pretrain.optim.offload.arithmetic`.

Triton is imported when it is first needed; without it, or where it cannot compile (it needs a C compiler), the update
runs as torch operations.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import StepScalars, adamw_, check_tensors

BLOCK = 1024


def gpu_adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    scalars: StepScalars,
) -> None:
    """One step in place on CUDA tensors; the contract of :func:`~pretrain.optim.offload.arithmetic.adamw_`.

    Enqueued on the current stream of the tensors' device; the host waits for nothing. Where Triton does not work it
    runs as torch operations. Raises ``ValueError`` for tensors that do not fit.
    """
    check_tensors(master, exp_avg, exp_avg_sq, gradient, weight)
    if master.device.type != "cuda":
        raise ValueError(f"the tensors are on {master.device}: this update is for a CUDA device")

    def start() -> None:
        with torch.cuda.device(master.device):
            launch(master, exp_avg, exp_avg_sq, gradient, weight, scalars, explicit=torch.version.hip is None)

    if master.numel() and (not has_triton() or not _first.launches(start)):
        adamw_(master, exp_avg, exp_avg_sq, gradient, weight, scalars)


class FirstLaunch:
    """Whether Triton works here, which its first launch tells: then it compiles, before anything is enqueued."""

    def __init__(self) -> None:
        self._works: bool | None = None

    def launches(self, start: Callable[[], None]) -> bool:
        """Call ``start`` unless the first one failed, which is said once; False where nothing was launched."""
        if self._works:
            start()
        elif self._works is None:
            try:
                start()
            except Exception as error:
                self._works = False
                warnings.warn(
                    f"The Triton kernel of AdamW cannot be compiled or started: {type(error).__name__}: {error}. The "
                    "update on the GPU runs through torch operations instead: the same bits, several times slower.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                self._works = True
        return bool(self._works)


_first = FirstLaunch()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def launch(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    scalars: StepScalars,
    *,
    explicit: bool,
) -> None:
    """Start the kernel on checked tensors; ``explicit`` chooses PTX instructions (NVIDIA only)."""
    count = master.numel()
    if count == 0:
        return
    low_bits = master.dtype == torch.int16
    # BF16 is widened and rounded in integers, as on the CPU, so it goes in as its bits.
    bits = weight is not None and weight.dtype == torch.bfloat16
    target = master if weight is None else weight.view(torch.int16) if bits else weight
    from pretrain.optim.offload.gpu_adamw_kernel import adamw_kernel

    adamw_kernel[(-(-count // BLOCK),)](
        master,
        exp_avg,
        exp_avg_sq,
        gradient.view(torch.int16) if gradient.dtype == torch.bfloat16 else gradient,
        target,
        count,
        *dataclasses.astuple(scalars),
        LOW_BITS=low_bits,
        WEIGHT=0 if weight is None else 1 if bits else 2,
        EXPLICIT=explicit,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
