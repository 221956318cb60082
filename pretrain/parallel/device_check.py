"""Quick check of a node's devices: ``python -m pretrain.parallel.device_check COUNT``; code 1 and one line at a fault.

Each device multiplies matrices whose product is known exactly, then all of them add a vector up over NCCL, from one
process. It says which device is at fault, where a rank's first step would end in a driver's error or a hang.
"""

from __future__ import annotations

import sys

import torch

_SIZE = 1024


def device_fault(count: int) -> str | None:
    """What is wrong with the first ``count`` CUDA devices of this machine; None when they work."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.device_count() < count:
        return f"{torch.cuda.device_count()} CUDA devices are visible, {count} ranks are to run here"
    sums = []
    for index in range(count):
        try:
            device = torch.device("cuda", index)
            ones = torch.ones(_SIZE, _SIZE, device=device, dtype=torch.bfloat16)
            if not bool(((ones @ ones) == _SIZE).all()):
                return f"cuda:{index} multiplied matrices wrongly"
            sums.append(torch.full((_SIZE,), float(index + 1), device=device))
        except RuntimeError as error:
            return f"cuda:{index}: {str(error).splitlines()[0]}"
    if count > 1:
        try:
            torch.cuda.nccl.all_reduce(sums)
            for index, total in enumerate(sums):
                torch.cuda.synchronize(index)
                if not bool((total == count * (count + 1) / 2).all()):
                    return f"cuda:{index} has a wrong sum after an all-reduce over NCCL"
        except RuntimeError as error:
            return f"all-reduce over NCCL: {str(error).splitlines()[0]}"
    return None


if __name__ == "__main__":
    fault = device_fault(int(sys.argv[1]))
    if fault is not None:
        print(fault)
    sys.exit(fault is not None)
