"""The chunked SSD algorithm with a hand-written backward.

Legend: L = sequence length, B = batch, H = heads, P = head dim, G = groups, N = state size, Q = chunk length,
K = chunks, R = rows of one slab (its chunks times the batch), X = H/G * P.

Source: Dao and Gu (arXiv 2405.21060), section 6: inside a chunk the output is a masked matrix product, between
chunks a state of P x N numbers per head is handed on. Decisions beyond the paper's listing:

* **Segment sums** (sums of a over j < t <= i) are differences of in-chunk cumulative sums held in float64 and
  rounded once, so a token with a very large decay does not spoil the sums behind it; above the diagonal they
  are clamped before the exponential, so nothing can become inf * 0.
* **A document boundary is a decay**: at the first token of a document a_t is set to RESET, whose exponential is
  exactly zero in float32 and float64. No mask is needed anywhere else and no value leaks.
* **What a group shares is computed once per group**: C B^T, and every product with the states, for which the
  heads of a group lie side by side, [B, G, N, X], so that one matrix product serves them all.
* **The backward recomputes** the decays; only the state entering each chunk is kept (L/Q * B * H * P * N
  numbers). The gradient of a decay is summed from the entries of the masked matrix off the diagonal, not as
  <dy, y> - <u, du>, which is cheaper but cancels, badly so in low precision.

On CPU one chunk is worked on at a time, so that its matrices stay in the cache and inputs are used in place; on
an accelerator all full chunks are folded into the batch, to launch few kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.blocks import arithmetic_dtype
from pretrain.ops.spans import Span, spans_of

RESET = -1000.0
# All that a decay can influence carries the factor exp(a); below this log decay its gradient is far below the
# rounding noise of the sums that compute it, and is set to exactly zero.
NEGLIGIBLE_LOG_DECAY = -60.0


class ChunkedSSD(torch.autograd.Function):
    """(x, dt, A, B, C, D or None, initial state or None, document starts or None, Q) -> (y, final state)."""

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
        work = arithmetic_dtype(x_LBHP.dtype)
        L, B, H, P = x_LBHP.shape
        G, N = B_LBGN.shape[2:]
        D_H1 = None if D_H is None else D_H.to(work)[:, None]
        spans = spans_of(L, chunk_size, _chunks_at_once(x_LBHP.device))
        states = x_LBHP.new_empty(sum(span.chunks for span in spans) + 1, B, G, N, H // G * P, dtype=work)
        if initial_state_BHPN is None:
            states[0].zero_()
        else:
            states[0].copy_(_pack_state(initial_state_BHPN, G))
        y_LBHP = x_LBHP.new_empty(L, B, H, P)
        for span in spans:
            Q = span.length
            decays = _Decays(span, dt_LBH, A_H.to(work), starts_LB)
            span_states = states[span.first : span.first + span.chunks + 1]
            slabs = zip(*(span.cut(t, work) for t in (x_LBHP, B_LBGN, C_LBGN)), strict=True)
            targets = span.views(y_LBHP)
            for slab, (x, B_QRGN, C_QRGN) in enumerate(slabs):
                R = x.shape[1]
                own = span.chunks_of(slab)
                keys, queries = _per_group(B_QRGN, G), _per_group(C_QRGN, G)
                u = x * decays.dt[slab]

                scores = torch.bmm(queries, keys.mT).tril_().view(R, G, 1, Q, Q)
                mixing = decays.within(slab).view(R, G, -1, Q, Q).mul_(scores)
                inside = torch.bmm(mixing.view(-1, Q, Q), _per_group(u, H)).view(R, H, Q, P)

                added = torch.bmm(keys.mT, _per_group(u.mul_(decays.exit[slab]), G))
                _carry(span_states[own.start : own.stop + 1], added, decays.total_KBH[own])
                read = torch.bmm(queries, span_states[own].view(R * G, N, -1))

                y = torch.addcmul(inside.permute(2, 0, 1, 3), _rows(read, R, G, P), decays.entry[slab], out=u)
                if D_H1 is not None:
                    y.addcmul_(x, D_H1)
                targets[slab].copy_(y.view_as(targets[slab]))
        ctx.save_for_backward(x_LBHP, dt_LBH, A_H, B_LBGN, C_LBGN, D_H, initial_state_BHPN, starts_LB, states)
        ctx.spans = spans
        return y_LBHP, _unpack_state(states[-1], P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_LBHP: Tensor, dfinal_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        x_LBHP, dt_LBH, A_H, B_LBGN, C_LBGN, D_H, initial_state_BHPN, starts_LB, states = ctx.saved_tensors
        work = states.dtype
        H, P = x_LBHP.shape[2:]
        G, N = B_LBGN.shape[2:]
        D_H1 = None if D_H is None else D_H.to(work)[:, None]
        dx_LBHP, ddt_LBH, dB_LBGN, dC_LBGN = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x_LBHP, dt_LBH, B_LBGN, C_LBGN)
        )
        dA_H, dD_HP = states.new_zeros(H), states.new_zeros(H * P)
        dstate = _pack_state(dfinal_BHPN.to(work), G)
        for span in reversed(ctx.spans):
            Q = span.length
            decays = _Decays(span, dt_LBH, A_H.to(work), starts_LB)
            span_states = states[span.first : span.first + span.chunks]
            slabs = [*zip(*(span.cut(t, work) for t in (x_LBHP, B_LBGN, C_LBGN, dy_LBHP)), strict=True)]
            targets = [*zip(*(span.views(t) for t in (dx_LBHP, dB_LBGN, dC_LBGN)), strict=True)]
            for slab, (x, B_QRGN, C_QRGN, dy) in reversed([*enumerate(slabs)]):
                R = x.shape[1]
                own = span.chunks_of(slab)
                keys, queries, dy_heads = _per_group(B_QRGN, G), _per_group(C_QRGN, G), _per_group(dy, H)
                exit_, dt = decays.exit[slab], decays.dt[slab]
                u = x * dt

                # What tokens of the chunk read from each other, y = (within * C B^T) u. The diagonal of within
                # has no exponent; it is left out of the exponents' gradient before it would have to cancel.
                scores = torch.bmm(queries, keys.mT).tril_().view(R, G, 1, Q, Q)
                within = decays.within(slab).view(R, G, -1, Q, Q)
                dmixing = torch.bmm(dy_heads, _per_group(u, H).mT).view_as(within).mul_(within)
                dscores = dmixing.sum(2).tril_().view(R * G, Q, Q)
                du = torch.bmm(within.mul_(scores).view(-1, Q, Q).mT, dy_heads).view(R, H, Q, P)
                pairs = dmixing.mul_(scores.tril_(-1)).view(R, H, Q, Q)
                decays.dread[slab] = pairs.sum(-1).sub_(pairs.sum(-2))

                # What they read from the state entering the chunk ...
                entering = span_states[own].view(R * G, N, -1)
                dy_entry = dy * decays.entry[slab]
                dy_group = _per_group(dy_entry, G)
                dC = torch.bmm(dy_group, entering.mT).baddbmm_(dscores, keys)
                dreads = torch.bmm(queries.mT, dy_group)
                read = _rows(torch.bmm(queries, entering), R, G, P)
                decays.dread[slab] += torch.mul(dy_entry, read, out=dy_entry).sum(-1).permute(1, 2, 0)
                dstate, leaving, decays.dtotal_KBH[own] = _carry_back(
                    dstate, dreads, span_states[own], decays.total_KBH[own]
                )
                # ... and what they write to the state leaving it.
                leaving = leaving.view(R * G, N, -1)
                exits = u.mul_(exit_)
                dB = torch.bmm(_per_group(exits, G), leaving.mT).baddbmm_(dscores.mT, queries)
                dexits = _rows(torch.bmm(keys, leaving), R, G, P)
                decays.dexit[slab] = torch.mul(exits, dexits, out=dy_entry).sum(-1).permute(1, 2, 0)

                du = torch.addcmul(du.permute(2, 0, 1, 3), dexits, exit_, out=u)
                decays.ddt[slab] = torch.mul(du, x, out=dy_entry).sum(-1).permute(1, 2, 0)
                dx = du.mul_(dt)
                if D_H1 is not None:
                    dx.addcmul_(dy, D_H1)
                    dD_HP += torch.mul(dy, x, out=dy_entry).reshape(Q * R, H * P).sum(0)
                dx_target, dB_target, dC_target = targets[slab]
                dx_target.copy_(dx.view_as(dx_target))
                dB_target.copy_(dB.transpose(0, 1).view_as(dB_target))
                dC_target.copy_(dC.transpose(0, 1).view_as(dC_target))
            ddt_LBH[span.start : span.stop], dA_span = decays.backward()
            dA_H += dA_span
        dinitial = None
        if initial_state_BHPN is not None:
            dinitial = _unpack_state(dstate, P).to(initial_state_BHPN.dtype)
        dD_H = None if D_H is None else dD_HP.view(H, P).sum(1).to(D_H.dtype)
        return dx_LBHP, ddt_LBH, dA_H.to(A_H.dtype), dB_LBGN, dC_LBGN, dD_H, dinitial, None, None


def _chunks_at_once(device: torch.device) -> int | None:
    """Chunks per slab; None = all."""
    return 1 if device.type == "cpu" else None


class _Decays:
    """Decay factors of a span, all in [0, 1], and the way back from their gradients to those of dt and A.

    Per slab, [Q, R, H, 1]: `dt`; `entry`, the decay from the state entering the chunk to a token; `exit`, from a
    token to the end of the chunk. `total_KBH` is the decay over whole chunks.
    """

    def __init__(self, span: Span, dt_LBH: Tensor, A_H: Tensor, starts_LB: Tensor | None) -> None:
        self.A_H1 = A_H[:, None]
        self.dt_KBHQ = span.split(dt_LBH).permute(1, 2, 3, 0).to(A_H.dtype).contiguous()
        self.a_KBHQ = self.dt_KBHQ * self.A_H1
        if starts_LB is not None:
            self.a_KBHQ.masked_fill_(span.split(starts_LB).permute(1, 2, 0)[:, :, None], RESET)
        cum_KBHQ = self.a_KBHQ.double().cumsum(-1)
        entry_KBHQ = cum_KBHQ.to(A_H.dtype).exp()
        exit_KBHQ = (cum_KBHQ[..., -1:] - cum_KBHQ).to(A_H.dtype).exp_()
        self.total_KBH = entry_KBHQ[..., -1].contiguous()
        self.cum_RHQ = [slab.flatten(0, 1) for slab in cum_KBHQ.split(span.chunks_at_once)]
        self.dt, self.entry, self.exit = (
            [slab.flatten(0, 1).permute(2, 0, 1)[..., None] for slab in factor.split(span.chunks_at_once)]
            for factor in (self.dt_KBHQ, entry_KBHQ, exit_KBHQ)
        )
        # Gradients, filled in per slab [R, H, Q]: of dt as a factor of u; of a token's cumulative exponent where
        # it reads, less where it is read; of the exponents of exit; and of total [K, B, H].
        self.ddt, self.dread, self.dexit = ([torch.empty(0)] * len(self.dt) for _ in range(3))
        self.dtotal_KBH = torch.empty_like(self.total_KBH)

    def within(self, slab: int) -> Tensor:
        """Decay from after token j to token i, [R, H, Q, Q]; ones above the diagonal."""
        cum_RHQ = self.cum_RHQ[slab]
        log_decay = (cum_RHQ[..., :, None] - cum_RHQ[..., None, :]).to(self.A_H1.dtype)
        return log_decay.clamp_max_(0.0).exp_()

    def backward(self) -> tuple[Tensor, Tensor]:
        """(gradient of the span's dt [K*Q, B, H], gradient of A).

        a_k acts on pairs j < k <= i, on reads of the entering state at i >= k, on writes to the leaving state at
        j < k, and on the whole chunk.
        """
        ddt, dread, dexit = (torch.cat(t).view_as(self.a_KBHQ) for t in (self.ddt, self.dread, self.dexit))
        da_KBHQ = dread.flip(-1).cumsum(-1).flip(-1)
        da_KBHQ += dexit.cumsum(-1).sub_(dexit).add_(self.dtotal_KBH[..., None])
        da_KBHQ.masked_fill_(self.a_KBHQ < NEGLIGIBLE_LOG_DECAY, 0.0)
        dA_H = (da_KBHQ * self.dt_KBHQ).sum((0, 1, 3))
        return ddt.addcmul_(da_KBHQ, self.A_H1).permute(0, 3, 1, 2).flatten(0, 1), dA_H


def _per_group(tensor_QRX: Tensor, groups: int) -> Tensor:
    """[Q, R, ...] -> [R * groups, Q, rest of the features / groups], one matrix per row and group."""
    Q, R = tensor_QRX.shape[:2]
    return tensor_QRX.reshape(Q, R * groups, -1).transpose(0, 1)


def _rows(product: Tensor, R: int, groups: int, P: int) -> Tensor:
    """[R * G, Q, X] -> [Q, R, H, P]; a view for one group."""
    return product.view(R, groups, product.shape[1], -1, P).permute(2, 0, 1, 3, 4).flatten(2, 3)


def _pack_state(state_BHPN: Tensor, groups: int) -> Tensor:
    """[B, H, P, N] -> [B, G, N, X]."""
    return state_BHPN.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3)


def _unpack_state(state_BGNX: Tensor, P: int) -> Tensor:
    """[B, G, N, X] -> [B, H, P, N]."""
    return state_BGNX.unflatten(3, (-1, P)).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _carry(states: Tensor, added: Tensor, total_KBH: Tensor) -> None:
    """Fill states[1:] [K, B, G, N, X]: state after chunk k = decay over chunk k * state before it + added."""
    K, B, G, N, X = states[1:].shape
    decay = total_KBH.view(K, B, G, 1, -1, 1)
    heads = (-1, B, G, N, decay.shape[4], X // decay.shape[4])
    states, added = states.view(heads), added.view(heads)
    for k in range(K):
        torch.addcmul(added[k], states[k], decay[k], out=states[k + 1])


def _carry_back(
    dstate_BGNX: Tensor, dreads: Tensor, entering_KBGNX: Tensor, total_KBH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `_carry`, where the entering states also receive `dreads` from the tokens that read them.

    Returns:
        The gradient of the first entering state, the gradients of the leaving states [K, B, G, N, H/G, P], and
        those of the exponents of the total decays [K, B, H].
    """
    K, B, G, N, X = entering_KBGNX.shape
    decay = total_KBH.view(K, B, G, 1, -1, 1)
    heads = (K, B, G, N, decay.shape[4], X // decay.shape[4])
    dreads, dstate = dreads.view(heads), dstate_BGNX.view(heads[1:])
    leaving = []
    for k in reversed(range(K)):
        leaving.append(dstate)
        dstate = torch.addcmul(dreads[k], dstate, decay[k])
    dleaving = leaving[0][None] if K == 1 else torch.stack(leaving[::-1])
    dtotal_KBH = (dleaving * entering_KBGNX.view(heads)).sum(3).sum(-1).flatten(2)
    return dstate.flatten(3), dleaving, dtotal_KBH * total_KBH
