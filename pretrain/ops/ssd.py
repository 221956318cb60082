"""State-space duality (SSD): the sequence transformation of Mamba-2.

Legend: L = sequence length, B = batch, H = heads, P = head dim, G = groups (G divides H), N = state size.
Everything is sequence-first. The recurrence, per head h (of group g), with a_t = dt_t A_h:

    state_t = exp(a_t) state_{t-1} + dt_t x_t (outer) B_t,g        y_t = C_t,g . state_t + D_h x_t

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060). `ssd_chunked` is for whole sequences,
`ssd_step` for generation, `ssd_recurrent_reference` is the definition, for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.spans import document_starts
from pretrain.ops.ssd_kernel import ChunkedSSD


def ssd_chunked(
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
) -> tuple[Tensor, Tensor]:
    """Mamba-2's sequence transformation over whole sequences, differentiable in every floating input.

    Inputs may be strided views (slices of a packed projection): only the last dimension has to be dense.
    Arithmetic is float32 (float64 for float64 inputs) whatever the input precision.

    Args:
        x_LBHP: input, fp32, bf16 or float64.
        dt_LBH: step sizes after softplus, >= 0.
        A_H: continuous decay per head, <= 0.
        B_LBGN, C_LBGN: input and output maps, shared by the H/G consecutive heads of a group.
        D_H: skip connection per head; None = no skip.
        seq_idx_LB: integer document number per position (padding -1); the state is reset at each change.
        initial_state_BHPN: state before position 0, belonging to the document of position 0; None = zeros.
        chunk_size: positions per chunk; any length is accepted, the last chunk may be shorter.

    Returns:
        y_LBHP in the precision of x, and the state after the last position [B, H, P, N] in the precision of
        the arithmetic. Continuing with that state gives what one pass over the whole would give.

    Raises:
        ValueError: when the shapes do not fit together or chunk_size < 1.
    """
    _check_shapes(x_LBHP, dt_LBH, A_H, B_LBGN, C_LBGN, D_H, seq_idx_LB, initial_state_BHPN, chunk_size)
    starts_LB = None if seq_idx_LB is None else document_starts(seq_idx_LB)
    y_LBHP, state_BHPN = ChunkedSSD.apply(
        x_LBHP, dt_LBH, A_H, B_LBGN, C_LBGN, D_H, initial_state_BHPN, starts_LB, chunk_size
    )
    return y_LBHP, state_BHPN


def ssd_step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for generation.

    Args and precision are those of `ssd_chunked` without the sequence dimension; the inputs are not changed.

    Returns:
        y_BHP in the precision of x, and the new state [B, H, P, N].
    """
    work = state_BHPN.dtype
    H, G = x_BHP.shape[1], B_BGN.shape[1]
    B_BHN = B_BGN.to(work).repeat_interleave(H // G, dim=1)
    C_BHN = C_BGN.to(work).repeat_interleave(H // G, dim=1)
    dt_BH = dt_BH.to(work)
    u_BHP = x_BHP.to(work) * dt_BH[..., None]
    decay_BH = torch.exp(dt_BH * A_H.to(work))
    state_BHPN = state_BHPN * decay_BH[..., None, None] + u_BHP[..., None] * B_BHN[:, :, None, :]
    y_BHP = (state_BHPN @ C_BHN[..., None]).squeeze(-1)
    if D_H is not None:
        y_BHP = y_BHP + D_H.to(work)[:, None] * x_BHP.to(work)
    return y_BHP.to(x_BHP.dtype), state_BHPN


def ssd_recurrent_reference(
    x_LBHP: Tensor,
    dt_LBH: Tensor,
    A_H: Tensor,
    B_LBGN: Tensor,
    C_LBGN: Tensor,
    D_H: Tensor | None = None,
    *,
    seq_idx_LB: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, by its definition: slow, differentiable by plain autograd, for tests."""
    L, B, H, P = x_LBHP.shape
    N = B_LBGN.shape[-1]
    state_BHPN = x_LBHP.new_zeros(B, H, P, N) if initial_state_BHPN is None else initial_state_BHPN
    outputs = []
    for t in range(L):
        if seq_idx_LB is not None and t > 0:
            same_B = seq_idx_LB[t] == seq_idx_LB[t - 1]
            state_BHPN = torch.where(same_B[:, None, None, None], state_BHPN, torch.zeros_like(state_BHPN))
        y_BHP, state_BHPN = ssd_step(state_BHPN, x_LBHP[t], dt_LBH[t], A_H, B_LBGN[t], C_LBGN[t], D_H)
        outputs.append(y_BHP)
    return torch.stack(outputs), state_BHPN


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    if x.dim() != 4 or B.dim() != 4 or x.numel() == 0:
        raise ValueError(
            f"ssd: x must be a non-empty [L, B, H, P] and B be [L, B, G, N], found {_sizes(x)} and {_sizes(B)}"
        )
    length, batch, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt": (dt, (length, batch, heads)),
        "A": (A, (heads,)),
        "B": (B, (length, batch, groups, state_size)),
        "C": (C, (length, batch, groups, state_size)),
        "D": (D, (heads,)),
        "seq_idx": (seq_idx, (length, batch)),
        "initial_state": (initial_state, (batch, heads, head_dim, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ssd: {name} has shape {_sizes(tensor)}, expected {shape} to go with x {_sizes(x)}")
    if heads % groups:
        raise ValueError(f"ssd: {heads} heads cannot share {groups} groups; choose groups that divide the heads")
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}, expected at least 1")


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
