"""What parameters, settings and saved state the torch optimizer with offloaded state can take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import round_to_bf16

MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SETTINGS = ("lr", "betas", "eps", "weight_decay")


def is_rounded(weight: Tensor, master: Tensor) -> bool:
    """Whether a 16-bit weight is its master (FP32, flat, on the host), rounded."""
    rounded = round_to_bf16(master) if weight.dtype == torch.bfloat16 else master.to(weight.dtype)
    found = weight.detach().reshape(-1).to(rounded.device)
    return bool(((found == rounded) | (found.isnan() & rounded.isnan())).all())


def gradient_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """One that holds all gradients exactly. ``grad_dtype`` is None where a gradient may have any."""
    dtypes = {getattr(p, "grad_dtype", p.dtype) for p in parameters}
    only = dtypes.pop()
    return torch.float32 if dtypes or only not in DTYPES else only


def tensors_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a flattened state has of slots that were not saved."""
    return {name: value for name, value in entry.items() if not isinstance(value, Mapping)}


def setting_faults(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """By group: what no AdamW works with."""
    faults = []
    for number, group in enumerate(groups):
        if missing := [name for name in _SETTINGS if name not in group]:
            faults.append(f"group {number} lacks {', '.join(missing)}, expected the settings of AdamW")
            continue
        for name in ("lr", "eps", "weight_decay"):
            if not float(group[name]) >= 0:
                faults.append(f"{name} of group {number} is {group[name]}, expected 0 or more")
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
            faults.append(f"betas of group {number} are {tuple(betas)}, expected two from 0 up to, but not, 1")
    return faults


def parameter_faults(parameters: Sequence[Tensor]) -> list[str]:
    if not parameters:
        return ["there is no parameter in any group, expected one or more"]
    faults = []
    for number, parameter in enumerate(parameters):
        name = f"parameter {number} of shape {tuple(parameter.shape)}"
        if not parameter.is_contiguous():
            faults.append(
                f"{name} is not contiguous in memory, expected that of a whole tensor: make it "
                "parameter.data = parameter.data.contiguous() first"
            )
        if parameter.dtype not in DTYPES:
            faults.append(f"{name} is {parameter.dtype}, expected float32, bfloat16 or float16")
        if parameter.device != parameters[0].device:
            faults.append(f"{name} is on {parameter.device}, parameter 0 on {parameters[0].device}, expected one")
    return faults


def foreign_faults(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Settings of torch's Adam that mean another update than this one."""
    faults = []
    for number, group in enumerate(groups):
        faults += [f"{n} of group {number} is true, expected false" for n in ("maximize", "amsgrad") if group.get(n)]
        if not group.get("decoupled_weight_decay", True) and group.get("weight_decay"):
            faults.append(f"weight_decay of group {number} is that of Adam (not decoupled), expected AdamW's")
    return faults


def entry_faults(entries: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor]) -> list[str]:
    """By parameter (an empty entry: never used): what is not its state under AdamW."""
    faults = []
    for number, (entry, parameter) in enumerate(zip(entries, parameters, strict=True)):
        missing = [name for name in ("step", *MOMENTS) if entry and name not in entry]
        if missing:
            faults.append(f"the state of parameter {number} lacks {', '.join(missing)}, expected that of AdamW")
        for slot in ("master", *MOMENTS):
            if slot in entry and entry[slot].numel() != parameter.numel():
                faults.append(
                    f"{slot} of parameter {number} has {entry[slot].numel()} elements, expected {parameter.numel()}"
                )
    steps = sorted({float(entry["step"]) for entry in entries if "step" in entry})
    if len(steps) > 1:
        faults.append(f"parameters are at steps {steps}, expected all that have state at one step")
    return faults


def few(numbers: Sequence[int]) -> str:
    """The first of many, for a message."""
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
