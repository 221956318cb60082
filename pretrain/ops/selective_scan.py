"""The selective scan: the sequence transformation of Mamba-1.

Legend: L = sequence length, B = batch, I = channels (inner width), N = state size. Everything is sequence-first. The
recurrence, for every channel i and state n:

    state_t = exp(dt_t,i A_i,n) state_{t-1} + dt_t,i B_t,n x_t,i        y_t,i = sum_n C_t,n state_t + D_i x_t,i

Source: Gu and Dao, "Mamba" (arXiv 2312.00752), equation 2 with the discretisation of section 3.3. `selective_scan` is
for whole sequences, `selective_scan_step` for generation, `selective_scan_reference` is the definition, for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pretrain.ops.selective_scan_kernel import SelectiveScan
from pretrain.ops.spans import document_starts


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
) -> tuple[Tensor, Tensor]:
    """Mamba-1's sequence transformation over whole sequences, differentiable in every floating input.

    Inputs may be strided views (slices of a packed projection). Arithmetic is float32 (float64 for float64 inputs)
    whatever the input precision.

    Args:
        x_LBI: input, fp32, bf16 or float64.
        dt_LBI: step sizes, >= 0 after `dt_bias_I` is added and, with `dt_softplus`, softplus taken.
        A_IN: continuous decays, <= 0.
        B_LBN, C_LBN: input and output maps, shared by all channels.
        D_I: skip connection per channel; None = no skip.
        z_LBI: gate; the output is multiplied by silu(z). None = no gate.
        seq_idx_LB: integer document number per position (padding -1); the state is reset at each change.
        initial_state_BIN: state before position 0, belonging to the document of position 0; None = zeros.
        chunk_size: positions per chunk (speed and memory, not the result); any length is accepted.

    Returns:
        y_LBI in the precision of x, and the state after the last position [B, I, N] in the precision of the
        arithmetic. Continuing with that state gives what one pass over the whole would give.

    Raises:
        ValueError: when the shapes do not fit together or chunk_size < 1.
    """
    _check_shapes(x_LBI, dt_LBI, A_IN, B_LBN, C_LBN, D_I, z_LBI, dt_bias_I, seq_idx_LB, initial_state_BIN, chunk_size)
    starts_LB = None if seq_idx_LB is None else document_starts(seq_idx_LB)
    y_LBI, state_BIN = SelectiveScan.apply(
        x_LBI, dt_LBI, A_IN, B_LBN, C_LBN, D_I, z_LBI, dt_bias_I, starts_LB, initial_state_BIN, dt_softplus, chunk_size
    )
    return y_LBI, state_BIN


def selective_scan_step(
    state_BIN: Tensor,
    x_BI: Tensor,
    dt_BI: Tensor,
    A_IN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_I: Tensor | None = None,
    *,
    z_BI: Tensor | None = None,
    dt_bias_I: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for generation.

    Args and precision are those of `selective_scan` without the sequence dimension; the inputs are not changed.

    Returns:
        y_BI in the precision of x, and the new state [B, I, N].
    """
    work = state_BIN.dtype
    x, dt = x_BI.to(work), dt_BI.to(work)
    if dt_bias_I is not None:
        dt = dt + dt_bias_I.to(work)
    if dt_softplus:
        dt = F.softplus(dt)
    decay_BIN = torch.exp(dt[..., None] * A_IN.to(work))
    state_BIN = state_BIN * decay_BIN + (dt * x)[..., None] * B_BN.to(work)[:, None]
    y = (state_BIN @ C_BN.to(work)[..., None]).squeeze(-1)
    if D_I is not None:
        y = y + D_I.to(work) * x
    if z_BI is not None:
        y = y * F.silu(z_BI.to(work))
    return y.to(x_BI.dtype), state_BIN


def selective_scan_reference(
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
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, by its definition: slow, differentiable by plain autograd, for tests."""
    L, B = x_LBI.shape[:2]
    state_BIN = x_LBI.new_zeros(B, *A_IN.shape) if initial_state_BIN is None else initial_state_BIN
    outputs = []
    for t in range(L):
        if seq_idx_LB is not None and t > 0:
            same_B = seq_idx_LB[t] == seq_idx_LB[t - 1]
            state_BIN = torch.where(same_B[:, None, None], state_BIN, torch.zeros_like(state_BIN))
        y_BI, state_BIN = selective_scan_step(
            state_BIN,
            x_LBI[t],
            dt_LBI[t],
            A_IN,
            B_LBN[t],
            C_LBN[t],
            D_I,
            z_BI=None if z_LBI is None else z_LBI[t],
            dt_bias_I=dt_bias_I,
            dt_softplus=dt_softplus,
        )
        outputs.append(y_BI)
    return torch.stack(outputs), state_BIN


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    if x.dim() != 3 or A.dim() != 2 or x.numel() == 0:
        raise ValueError(
            f"selective_scan: x must be a non-empty [L, B, I] and A be [I, N], found {tuple(x.shape)} and "
            f"{tuple(A.shape)}"
        )
    length, batch, inner = x.shape
    state_size = A.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt": (dt, (length, batch, inner)),
        "A": (A, (inner, state_size)),
        "B": (B, (length, batch, state_size)),
        "C": (C, (length, batch, state_size)),
        "D": (D, (inner,)),
        "z": (z, (length, batch, inner)),
        "dt_bias": (dt_bias, (inner,)),
        "seq_idx": (seq_idx, (length, batch)),
        "initial_state": (initial_state, (batch, inner, state_size)),
    }
    faults = [
        f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
        for name, (tensor, shape) in expected.items()
        if tensor is not None and tuple(tensor.shape) != shape
    ]
    if chunk_size < 1:
        faults.append(f"chunk_size is {chunk_size}, expected at least 1")
    if faults:
        raise ValueError(f"selective_scan: to go with x {tuple(x.shape)} and A {tuple(A.shape)}: " + "; ".join(faults))
