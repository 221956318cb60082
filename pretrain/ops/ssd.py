"""State-space duality (SSD): the sequence transformation of Mamba-2, chunked, with a hand-written backward.

Legend: L = sequence length, B = batch, H = heads, P = head dim, G = groups (G divides H), N = state size,
Q = chunk length, K = chunks treated at once. Everything is sequence-first.

The recurrence, per head h (of group g), with a_t = dt_t A_h:

    state_t = exp(a_t) state_{t-1} + dt_t x_t (outer) B_t,g        y_t = C_t,g . state_t + D_h x_t

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6: inside a chunk the output is a masked
matrix product, between chunks a state of P x N numbers per head is handed on. Three decisions beyond the paper's listing:

* **Segment sums** (sums of a over j < t <= i) are differences of in-chunk cumulative sums held in float64 and
  rounded once, so a token with a very large decay does not spoil the sums behind it; above the diagonal they
  are clamped before the exponential, so nothing can become inf * 0.
* **A document boundary is a decay**: at the first token of a document a_t is set to RESET, whose exponential
  is exactly zero in both precisions. No mask is needed anywhere else and no value leaks.
* **Backward recomputes** the decay matrices chunk by chunk; only the state entering each chunk is kept
  (L/Q x B x H x P x N numbers).

On CPU one chunk at a time is worked on, so that its Q x Q matrices stay in the cache; on an accelerator all
full chunks are taken at once, to keep the number of kernel launches low.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp(RESET) == 0.0 in float32 and in float64; small enough not to cost digits of a float64 cumulative sum.
RESET = -1000.0
# Every path that a decay can influence carries the factor exp(a); below this log decay the gradient is smaller
# than the rounding noise of the sums that compute it, and is set to exactly zero.
NEGLIGIBLE_LOG_DECAY = -60.0


def document_starts(segment_ids_LB: Tensor) -> Tensor:
    """Mark the positions whose document differs from the position before: bool [L, B], row 0 always False.

    Args:
        segment_ids_LB: document number per position, padding -1; only changes matter, not the numbers.
    """
    starts_LB = torch.zeros_like(segment_ids_LB, dtype=torch.bool)
    starts_LB[1:] = segment_ids_LB[1:] != segment_ids_LB[:-1]
    return starts_LB


def ssd_chunked(
    x_LBHP: Tensor,
    dt_LBH: Tensor,
    A_H: Tensor,
    B_LBGN: Tensor,
    C_LBGN: Tensor,
    D_H: Tensor | None = None,
    *,
    segment_ids_LB: Tensor | None = None,
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
        segment_ids_LB: integer document number per position (padding -1); the state is reset at each change.
        initial_state_BHPN: state before position 0, belonging to the document of position 0; None = zeros.
        chunk_size: positions per chunk; any length is accepted, the last chunk may be shorter.

    Returns:
        y_LBHP in the precision of x, and the state after the last position [B, H, P, N] in the precision of
        the arithmetic. Continuing with that state gives what one pass over the whole would give.

    Raises:
        ValueError: when the shapes do not fit together or chunk_size < 1.
    """
    _check_shapes(x_LBHP, dt_LBH, A_H, B_LBGN, C_LBGN, D_H, segment_ids_LB, initial_state_BHPN, chunk_size)
    starts_LB = None if segment_ids_LB is None else document_starts(segment_ids_LB)
    y_LBHP, state_BHPN = _SSD.apply(
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
    segment_ids_LB: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, by its definition: slow, differentiable by plain autograd, for tests."""
    L, B, H, P = x_LBHP.shape
    N = B_LBGN.shape[-1]
    state_BHPN = x_LBHP.new_zeros(B, H, P, N) if initial_state_BHPN is None else initial_state_BHPN
    outputs = []
    for t in range(L):
        if segment_ids_LB is not None and t > 0:
            same_B = segment_ids_LB[t] == segment_ids_LB[t - 1]
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
    segment_ids: Tensor | None,
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
        "segment_ids": (segment_ids, (length, batch)),
        "initial_state": (initial_state, (batch, heads, head_dim, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"ssd: {name} has shape {_sizes(tensor)}, expected {shape} to go with x {_sizes(x)}"
            )
    if heads % groups:
        raise ValueError(
            f"ssd: {heads} heads cannot share {groups} groups; choose groups that divide the heads"
        )
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}, expected at least 1")


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _slabs(length: int, chunk_size: int, chunks_at_once: int) -> Iterator[tuple[int, int, int]]:
    """Cut a sequence into (start, number of chunks, chunk length); a shorter last chunk is a slab of its own."""
    full = length // chunk_size
    for first in range(0, full, chunks_at_once):
        yield first * chunk_size, min(chunks_at_once, full - first), chunk_size
    if length % chunk_size:
        yield full * chunk_size, 1, length % chunk_size


def _slab_plan(x_LBHP: Tensor, chunk_size: int) -> list[tuple[int, int, int]]:
    chunks_at_once = 1 if x_LBHP.device.type == "cpu" else max(1, x_LBHP.shape[0] // chunk_size)
    return list(_slabs(x_LBHP.shape[0], chunk_size, chunks_at_once))


class _Decays(NamedTuple):
    """Decay factors of one slab, all in [0, 1]."""

    within_KBHQQ: Tensor  # from after token j to token i; ones above the diagonal
    entry_KQBH: Tensor  # from the state entering the chunk to token i
    exit_KQBH: Tensor  # from token j to the end of the chunk
    total_KBH: Tensor  # over the whole chunk


def _decays(a_KQBH: Tensor) -> _Decays:
    work = a_KQBH.dtype
    cum_KBHQ = a_KQBH.permute(0, 2, 3, 1).to(torch.float64, memory_format=torch.contiguous_format).cumsum(-1)
    within_KBHQQ = (cum_KBHQ[..., :, None] - cum_KBHQ[..., None, :]).to(work).clamp_max_(0.0).exp_()
    entry_KBHQ = cum_KBHQ.to(work).exp_()
    exit_KBHQ = within_KBHQQ[..., -1, :]
    return _Decays(
        within_KBHQQ, entry_KBHQ.permute(0, 3, 1, 2), exit_KBHQ.permute(0, 3, 1, 2), entry_KBHQ[..., -1]
    )


def _by_chunk(tensor: Tensor, start: int, chunks: int, length: int, work: torch.dtype) -> Tensor:
    """[L, ...] -> the slab's [K, Q, ...], a view when the precision is already that of the arithmetic."""
    return tensor[start : start + chunks * length].unflatten(0, (chunks, length)).to(work)


def _by_group(tensor_KQBGX: Tensor) -> Tensor:
    """[K, Q, B, G, X] -> [K*B*G, Q, X] for one product per chunk, row and group (no copy when K = 1)."""
    return tensor_KQBGX.permute(0, 2, 3, 1, 4).flatten(0, 2)


def _log_decay(dt: Tensor, A_H: Tensor, starts: Tensor | None) -> Tensor:
    a = dt * A_H
    return a if starts is None else a.masked_fill_(starts[..., None], RESET)


class _SSD(torch.autograd.Function):
    """States are held as [B, G, N, (H/G) P], so that all heads of a group take part in one product."""

    @staticmethod
    def forward(
        ctx: Any,
        x_LBHP: Tensor,
        dt_LBH: Tensor,
        A_H: Tensor,
        B_LBGN: Tensor,
        C_LBGN: Tensor,
        D_H: Tensor | None,
        initial_state_BHPN: Tensor | None,
        starts_LB: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        work = torch.float64 if x_LBHP.dtype == torch.float64 else torch.float32
        L, B, H, P = x_LBHP.shape
        G, N = B_LBGN.shape[2:]
        A_work, D_work = A_H.to(work), None if D_H is None else D_H.to(work)[:, None]
        plan = _slab_plan(x_LBHP, chunk_size)
        states = x_LBHP.new_empty(sum(chunks for _, chunks, _ in plan) + 1, B, G, N, H // G * P, dtype=work)
        if initial_state_BHPN is None:
            states[0].zero_()
        else:
            states[0].copy_(_pack_state(initial_state_BHPN, G))
        y_LBHP = x_LBHP.new_empty(L, B, H, P)
        first = 0
        for start, chunks, length in plan:
            cut = (start, chunks, length, work)
            x, dt = _by_chunk(x_LBHP, *cut), _by_chunk(dt_LBH, *cut)
            B_, C_ = _by_group(_by_chunk(B_LBGN, *cut)), _by_group(_by_chunk(C_LBGN, *cut))
            starts = None if starts_LB is None else _by_chunk(starts_LB, start, chunks, length, torch.bool)
            decays = _decays(_log_decay(dt, A_work, starts))
            u = x * dt[..., None]

            scores = torch.bmm(C_, B_.mT).tril_().view(chunks, B, G, 1, length, length)
            mixing = decays.within_KBHQQ.view(chunks, B, G, -1, length, length) * scores
            inside = torch.bmm(mixing.view(-1, length, length), _by_group(u))

            exits = (u * decays.exit_KQBH[..., None]).view(chunks, length, B, G, -1)
            added = torch.bmm(B_.mT, _by_group(exits)).view(chunks, B, G, N, -1)
            _carry(states[first : first + chunks + 1], added, decays.total_KBH, P)
            entering = states[first : first + chunks].view(chunks * B * G, N, -1)
            carried = torch.bmm(C_, entering).view(chunks, B, G, length, -1, P)

            y = torch.addcmul(
                inside.view(chunks, B, H, length, P).permute(0, 3, 1, 2, 4),
                carried.permute(0, 3, 1, 2, 4, 5).flatten(3, 4),
                decays.entry_KQBH[..., None],
            )
            if D_work is not None:
                y.addcmul_(x, D_work)
            y_LBHP[start : start + chunks * length] = y.flatten(0, 1)
            first += chunks
        ctx.save_for_backward(x_LBHP, dt_LBH, A_H, B_LBGN, C_LBGN, D_H, initial_state_BHPN, starts_LB, states)
        ctx.plan = plan
        return y_LBHP, _unpack_state(states[-1], P)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_LBHP: Tensor, dstate_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        x_LBHP, dt_LBH, A_H, B_LBGN, C_LBGN, D_H, initial_state_BHPN, starts_LB, states = ctx.saved_tensors
        work = states.dtype
        B, H, P = x_LBHP.shape[1:]
        G, N = B_LBGN.shape[2:]
        A_work, D_work = A_H.to(work), None if D_H is None else D_H.to(work)[:, None]
        dx_LBHP = torch.empty_like(x_LBHP, memory_format=torch.contiguous_format)
        ddt_LBH = torch.empty_like(dt_LBH, memory_format=torch.contiguous_format)
        dB_LBGN = torch.empty_like(B_LBGN, memory_format=torch.contiguous_format)
        dC_LBGN = torch.empty_like(C_LBGN, memory_format=torch.contiguous_format)
        dA_H, dD_H = torch.zeros_like(A_work), torch.zeros_like(A_work)
        dstate = _pack_state(dstate_BHPN, G).to(work, memory_format=torch.contiguous_format, copy=True)
        last = states.shape[0] - 1
        for start, chunks, length in reversed(ctx.plan):
            cut = (start, chunks, length, work)
            first = last - chunks
            rows = slice(start, start + chunks * length)
            x, dt, dy = (_by_chunk(t, *cut) for t in (x_LBHP, dt_LBH, dy_LBHP))
            B_, C_ = _by_group(_by_chunk(B_LBGN, *cut)), _by_group(_by_chunk(C_LBGN, *cut))
            starts = None if starts_LB is None else _by_chunk(starts_LB, start, chunks, length, torch.bool)
            a = _log_decay(dt, A_work, starts)
            decays = _decays(a)
            u = x * dt[..., None]
            u_heads, dy_heads = _by_group(u), _by_group(dy)
            flat = (chunks, length, B, G, H // G * P)

            # The chunk's own product y = (decay * C B^T) u.
            scores = torch.bmm(C_, B_.mT).tril_().view(chunks, B, G, 1, length, length)
            within = decays.within_KBHQQ.view(chunks, B, G, -1, length, length)
            du = torch.bmm((within * scores).view(-1, length, length).mT, dy_heads)
            weighted = torch.bmm(dy_heads, u_heads.mT).view_as(within).mul_(within)
            dscores = weighted.sum(3).tril_().view(-1, length, length)
            # d(log decay of the pair i, j): the diagonal does not decay, and is left out before it could cancel.
            pairs = weighted.mul_(scores.tril(-1)).view(chunks, B, H, length, length)
            dlog_KBHQ = pairs.sum(-1).sub_(pairs.sum(-2))

            # The state entering the chunk, read by C ...
            dy_entry = dy * decays.entry_KQBH[..., None]
            dy_flat = _by_group(dy_entry.view(flat))
            entering = states[first:last].view(chunks * B * G, N, -1)
            carried = torch.bmm(C_, entering).view(chunks, B, G, length, -1, P).permute(0, 3, 1, 2, 4, 5)
            dlog_KBHQ += (dy_entry * carried.flatten(3, 4)).sum(-1).permute(0, 2, 3, 1)
            dC = torch.bmm(dy_flat, entering.mT).baddbmm_(dscores, B_)
            dstates = torch.bmm(C_.mT, dy_flat).view(chunks, B, G, N, -1)
            dstate, dleaving, dtotal_KBH = _carry_back(
                dstate, dstates, states[first:last], decays.total_KBH, P
            )
            # ... and the state leaving it, written by B.
            dleaving_flat = dleaving.view(chunks * B * G, N, -1)
            exits = u * decays.exit_KQBH[..., None]
            exits_flat = _by_group(exits.view(flat))
            dB = torch.bmm(exits_flat, dleaving_flat.mT).baddbmm_(dscores.mT, C_)
            dexits = torch.bmm(B_, dleaving_flat).view(chunks, B, G, length, -1, P)
            dexits = dexits.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
            dexit_log_KBHQ = (dexits * exits).sum(-1).permute(0, 2, 3, 1)

            du = torch.addcmul(
                du.view(chunks, B, H, length, P).permute(0, 3, 1, 2, 4), dexits, decays.exit_KQBH[..., None]
            )
            dx = du * dt[..., None]
            if D_work is not None:
                dx.addcmul_(dy, D_work)
                dD_H += (dy * x).sum((0, 1, 2, 4))
            dx_LBHP[rows] = dx.flatten(0, 1)

            # a_k acts on pairs j < k <= i, on reads at i >= k, on writes at j < k and on the whole chunk.
            da_KBHQ = dlog_KBHQ.flip(-1).cumsum(-1).flip(-1)
            da_KBHQ += dexit_log_KBHQ.cumsum(-1).sub_(dexit_log_KBHQ) + dtotal_KBH[..., None]
            da = da_KBHQ.permute(0, 3, 1, 2).masked_fill(a < NEGLIGIBLE_LOG_DECAY, 0.0)
            dA_H += (da * dt).sum((0, 1, 2))
            ddt_LBH[rows] = (du * x).sum(-1).addcmul_(da, A_work).flatten(0, 1)
            dB_LBGN[rows] = _from_groups(dB, chunks, B, G)
            dC_LBGN[rows] = _from_groups(dC, chunks, B, G)
            last = first
        dinitial = None
        if initial_state_BHPN is not None:
            dinitial = _unpack_state(dstate, P).to(initial_state_BHPN.dtype)
        dD = None if D_H is None else dD_H.to(D_H.dtype)
        return dx_LBHP, ddt_LBH, dA_H.to(A_H.dtype), dB_LBGN, dC_LBGN, dD, dinitial, None, None


def _from_groups(tensor: Tensor, chunks: int, B: int, G: int) -> Tensor:
    """[K*B*G, Q, X] -> [K*Q, B, G, X]."""
    return tensor.unflatten(0, (chunks, B, G)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _pack_state(state_BHPN: Tensor, G: int) -> Tensor:
    return state_BHPN.unflatten(1, (G, -1)).permute(0, 1, 4, 2, 3).flatten(3)


def _unpack_state(state_BGNX: Tensor, P: int) -> Tensor:
    return state_BGNX.unflatten(3, (-1, P)).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _carry(states: Tensor, added_KBGNX: Tensor, total_KBH: Tensor, P: int) -> None:
    """Fill states[1:] of a slab: state after chunk k = decay over chunk k * state before it + what it adds."""
    heads = (*added_KBGNX.shape[1:4], -1, P)
    for k in range(added_KBGNX.shape[0]):
        decay = total_KBH[k].view(heads[0], heads[1], 1, -1, 1)
        torch.addcmul(added_KBGNX[k].view(heads), states[k].view(heads), decay, out=states[k + 1].view(heads))


def _carry_back(
    dstate_BGNX: Tensor, dread_KBGNX: Tensor, entering_KBGNX: Tensor, total_KBH: Tensor, P: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `_carry` together with the gradients that the reads put on the entering states.

    Returns:
        The gradient of the slab's first entering state, those of the leaving states [K, B, G, N, X], and
        d(loss)/d(log total decay) [K, B, H].
    """
    K, B, G, N, _ = dread_KBGNX.shape
    heads = (B, G, N, -1, P)
    dleaving = torch.empty_like(dread_KBGNX)
    for k in reversed(range(K)):
        dleaving[k] = dstate_BGNX
        decay = total_KBH[k].view(B, G, 1, -1, 1)
        dstate_BGNX = torch.addcmul(dread_KBGNX[k].view(heads), dstate_BGNX.view(heads), decay).flatten(3)
    paired = (dleaving * entering_KBGNX).view(K, B, G, N, -1, P).sum((3, 5)).flatten(2)
    return dstate_BGNX, dleaving, paired * total_KBH
