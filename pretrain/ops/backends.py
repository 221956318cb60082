"""Which kernel computes an operation: ours in torch, or on CUDA one of the libraries that are installed.

The environment variable PRETRAIN_KERNELS chooses: `auto` (the default: on CUDA tensors the first library that is
installed, else torch), `torch`, `mamba_ssm` (with causal-conv1d) or `fla` (flash-linear-attention; it has a kernel for
SSD only, the rest is torch). A call that the chosen kernel cannot serve (packed documents, float64, ...) is computed by
torch, with one warning for each reason. Arguments and results are those of the functions of the same name in
`ops.ssd`, `ops.selective_scan`, `ops.conv` and `ops.norm`; `need_state` tells whether the final state is wanted.
"""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from pretrain.ops import backends_adapters as adapters
from pretrain.ops import conv, norm
from pretrain.ops import selective_scan as selective_scan_torch
from pretrain.ops import ssd as ssd_torch

VARIABLE = "PRETRAIN_KERNELS"
KERNELS: dict[str, dict[str, Any]] = {
    "ssd": {"mamba_ssm": adapters.MambaSSD, "fla": adapters.FlaSSD},
    "selective_scan": {"mamba_ssm": adapters.MambaSelectiveScan},
    "causal_conv": {"mamba_ssm": adapters.CausalConv1d},
    "gated_rms_norm": {"mamba_ssm": adapters.MambaGatedNorm},
}
"""Kernels of each operation by choice, preferred first."""
CHOICES = ("auto", "torch", "mamba_ssm", "fla")


@dataclass(frozen=True)
class Choice:
    """The kernel of an operation on CUDA tensors (`adapter` None: torch's), and why."""

    operation: str
    backend: str
    reason: str
    adapter: Any = None
    function: adapters.Function | None = None


def ssd(
    x_LBHP: Tensor,
    dt_LBH: Tensor,
    A_H: Tensor,
    B_LBGN: Tensor,
    C_LBGN: Tensor,
    D_H: Tensor | None = None,
    *,
    seq_idx_LB: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    chunk_size: int = 64,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See `ops.ssd.ssd_chunked`; the state is None where it is not needed and a library computes."""
    arguments = {
        "x_LBHP": x_LBHP,
        "dt_LBH": dt_LBH,
        "A_H": A_H,
        "B_LBGN": B_LBGN,
        "C_LBGN": C_LBGN,
        "D_H": D_H,
        "seq_idx_LB": seq_idx_LB,
        "initial_state_BHPN": initial_state_BHPN,
        "chunk_size": chunk_size,
    }
    choice = _serving("ssd", x_LBHP, **arguments, need_state=need_state)
    if choice is None:
        return ssd_torch.ssd_chunked(**arguments)  # type: ignore[arg-type]
    result: tuple[Tensor, Tensor | None] = choice.adapter.call(choice.function, **arguments, need_state=need_state)
    return result


def selective_scan(
    x_LBI: Tensor,
    dt_LBI: Tensor,
    A_IN: Tensor,
    B_LBN: Tensor,
    C_LBN: Tensor,
    D_I: Tensor | None = None,
    *,
    z_LBI: Tensor | None = None,
    dt_bias_I: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx_LB: Tensor | None = None,
    initial_state_BIN: Tensor | None = None,
    chunk_size: int = 32,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See `ops.selective_scan.selective_scan`; the state is None where it is not needed and a library computes."""
    arguments = {
        "x_LBI": x_LBI,
        "dt_LBI": dt_LBI,
        "A_IN": A_IN,
        "B_LBN": B_LBN,
        "C_LBN": C_LBN,
        "D_I": D_I,
        "z_LBI": z_LBI,
        "dt_bias_I": dt_bias_I,
        "dt_softplus": dt_softplus,
        "seq_idx_LB": seq_idx_LB,
        "initial_state_BIN": initial_state_BIN,
        "chunk_size": chunk_size,
    }
    choice = _serving("selective_scan", x_LBI, **arguments, need_state=need_state)
    if choice is None:
        return selective_scan_torch.selective_scan(**arguments)  # type: ignore[arg-type]
    result: tuple[Tensor, Tensor | None] = choice.adapter.call(choice.function, **arguments, need_state=need_state)
    return result


def causal_conv(
    x_LBC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    seq_idx_LB: Tensor | None = None,
    initial_state_KBC: Tensor | None = None,
) -> Tensor:
    """See `ops.conv.causal_conv`."""
    arguments = {
        "x_LBC": x_LBC,
        "weight_CK": weight_CK,
        "bias_C": bias_C,
        "seq_idx_LB": seq_idx_LB,
        "initial_state_KBC": initial_state_KBC,
    }
    choice = _serving("causal_conv", x_LBC, **arguments)
    if choice is None:
        return conv.causal_conv(**arguments)  # type: ignore[arg-type]
    result: Tensor = choice.adapter.call(choice.function, **arguments)
    return result


def gated_rms_norm(y: Tensor, z: Tensor, weight_D: Tensor, num_groups: int = 1, eps: float = 1e-5) -> Tensor:
    """See `ops.norm.gated_rms_norm`."""
    arguments = {"y": y, "z": z, "weight_D": weight_D, "num_groups": num_groups, "eps": eps}
    choice = _serving("gated_rms_norm", y, **arguments)
    if choice is None:
        return norm.gated_rms_norm(**arguments)  # type: ignore[arg-type]
    result: Tensor = choice.adapter.call(choice.function, **arguments)
    return result


def choices() -> list[Choice]:
    """What CUDA tensors would meet here, for each operation.

    Raises:
        ValueError: when PRETRAIN_KERNELS asks for what is not there.
    """
    return [_choose(operation, os.environ.get(VARIABLE) or "auto") for operation in KERNELS]


def _serving(operation: str, tensor: Tensor, **arguments: Any) -> Choice | None:
    """The library's kernel for this call; None for torch's."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if not _on_accelerator(tensor):
        _refuse_on_cpu(wanted)
        return None
    choice = _choose(operation, wanted)
    if choice.adapter is None:
        return None
    obstacle = choice.adapter.obstacle(**arguments)
    if obstacle is None:
        return choice
    library = f"{choice.adapter.name} of {choice.adapter.distribution}"
    _warn_once(f"{operation}: torch computes some calls instead of {library}: {obstacle}")
    return None


@cache
def _choose(operation: str, wanted: str) -> Choice:
    _refuse_unknown(wanted)
    kernels = KERNELS[operation]
    if wanted == "torch":
        return Choice(operation, "torch", f"{VARIABLE}=torch")
    if wanted not in ("auto", *kernels):
        return Choice(operation, "torch", f"{wanted} has no kernel for it")
    missing = []
    for backend in kernels if wanted == "auto" else [wanted]:
        adapter = kernels[backend]
        function, found = _load(adapter)
        if function is not None:
            return Choice(operation, backend, f"{adapter.name} of {found}", adapter, function)
        missing.append(found)
    if wanted != "auto":
        raise ValueError(
            f"{VARIABLE}={wanted} cannot be used for {operation}: {missing[0]}; "
            f"pip install {kernels[wanted].distribution}, or set {VARIABLE} to auto (or unset it)"
        )
    return Choice(operation, "torch", "; ".join(missing))


def _load(adapter: Any) -> tuple[adapters.Function | None, str]:
    """The library's function and what was found; None and what is missing."""
    if find_spec(adapter.module.split(".")[0]) is None:
        return None, f"{adapter.distribution} is not installed"
    try:
        found = f"{adapter.distribution} {metadata.version(adapter.distribution)}"
    except metadata.PackageNotFoundError:
        found = adapter.distribution
    try:
        function = getattr(importlib.import_module(adapter.module), adapter.name)
        unknown = set(adapter.parameters) - inspect.signature(function).parameters.keys()
    except Exception as error:  # a library built for another torch or CUDA fails with all sorts
        return None, f"{found} does not import: {type(error).__name__}: {error}"
    if unknown:
        return None, f"{found}: {adapter.name} lacks the arguments {', '.join(sorted(unknown))}"
    return function, found


def _on_accelerator(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


@cache
def _refuse_unknown(wanted: str) -> None:
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE}={wanted!r} is not known; set it to one of {', '.join(CHOICES)}")


@cache
def _refuse_on_cpu(wanted: str) -> None:
    _refuse_unknown(wanted)
    if wanted not in ("auto", "torch"):
        raise ValueError(
            f"{VARIABLE}={wanted}: these kernels work on CUDA tensors, found tensors on another device; "
            f"set {VARIABLE} to auto or torch (or unset it)"
        )


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)
