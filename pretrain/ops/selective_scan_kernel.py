"""The chunked selective scan with a hand-written backward.

Legend: L = sequence length, B = batch, I = channels, N = state size, Q = chunk length, K = chunks, R = rows of one
slab (its chunks times the batch), J = channels of one block.

Source: Gu and Dao (arXiv 2312.00752), section 3.3 and algorithm 2, whose point is kept: states are never written to
memory for the whole sequence. Only the state entering each chunk is kept for the backward (L/Q * B * I * N numbers);
the backward computes the states of a chunk again. Decisions beyond the paper:

* **No logarithms of decays are subtracted**: decays differ between the N states of a channel, so no matrix product
  serves a chunk, and sums of decays in the exponent would need a division that overflows. The recurrence is followed
  position by position, over all channels and states of a block at once, in buffers that stay in the cache.
* **A document boundary is a decay**: RESET is added to the exponent at the first token of a document, and its
  exponential is exactly zero in float32 and float64. No mask is needed anywhere else and no value leaks.
* **Softplus, its bias and the gate are computed inside**, and again in the backward, so that neither the step sizes
  nor the ungated output are kept.
* **Several chunks at once** (always on an accelerator; on CPU when one position is too little work for a call): first
  each chunk from a zero state, then the hand-over between chunks, then again with the right entering states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from pretrain.ops.blocks import arithmetic_dtype
from pretrain.ops.spans import Span, spans_of

RESET = -1000.0
# Numbers of one position that are worked on by one call (batch * states * channels of a block): enough to outweigh
# the call, few enough for a chunk of them to stay in the cache.
CPU_POSITION_NUMBERS = 1 << 14
# Numbers of one slab on an accelerator: 256 MiB a buffer in float32.
ACCELERATOR_SLAB_NUMBERS = 1 << 26


class SelectiveScan(torch.autograd.Function):
    """(x, dt, A, B, C, D or None, z or None, dt bias or None, document starts or None, initial state or None,
    softplus?, Q) -> (y, final state [B, I, N])."""

    @staticmethod
    def forward(
        ctx: Any,
        x_LBI: Tensor,
        dt_LBI: Tensor,
        A_IN: Tensor,
        B_LBN: Tensor,
        C_LBN: Tensor,
        D_I: Tensor | None,
        z_LBI: Tensor | None,
        dt_bias_I: Tensor | None,
        starts_LB: Tensor | None,
        initial_state_BIN: Tensor | None,
        softplus: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        work = arithmetic_dtype(x_LBI.dtype)
        L, B, inner = x_LBI.shape
        N = A_IN.shape[1]
        inputs = _Inputs(x_LBI, dt_LBI, A_IN, B_LBN, C_LBN, D_I, z_LBI, dt_bias_I, starts_LB)
        spans = spans_of(L, chunk_size, _chunks_at_once(x_LBI.device, B * N * inner))
        states_KBNI = x_LBI.new_empty(sum(span.chunks for span in spans) + 1, B, N, inner, dtype=work)
        if initial_state_BIN is None:
            states_KBNI[0].zero_()
        else:
            states_KBNI[0].copy_(initial_state_BIN.mT)
        y_LBI = x_LBI.new_empty(L, B, inner)
        for channels in _channel_blocks(spans, x_LBI.device, B, N, inner):
            _forward(inputs.block(channels), spans, softplus, states_KBNI[..., channels], y_LBI[..., channels])
        ctx.save_for_backward(*inputs, initial_state_BIN, states_KBNI)
        ctx.spans, ctx.softplus = spans, softplus
        return y_LBI, states_KBNI[-1].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_LBI: Tensor, dfinal_BIN: Tensor) -> tuple[Tensor | None, ...]:
        *saved, initial_state_BIN, states_KBNI = ctx.saved_tensors
        inputs = _Inputs(*saved)
        work = states_KBNI.dtype
        _, B, N, inner = states_KBNI.shape
        grads = _Gradients.empty(inputs, work)
        dstate_BNI = dfinal_BIN.to(work).mT.contiguous()
        for channels in _channel_blocks(ctx.spans, dy_LBI.device, B, N, inner):
            dstate_BNI[..., channels] = _backward(
                inputs.block(channels),
                ctx.spans,
                ctx.softplus,
                states_KBNI[..., channels],
                dy_LBI[..., channels],
                dstate_BNI[..., channels],
                grads.block(channels),
            )
        dinitial = None if initial_state_BIN is None else dstate_BNI.mT.to(initial_state_BIN.dtype)
        return (*grads.like(inputs), None, dinitial, None, None)


class _Inputs(NamedTuple):
    """The tensors of a scan, of all channels or of one block; all [..., I] but those without channels."""

    x_LBI: Tensor
    dt_LBI: Tensor
    A_IN: Tensor
    B_LBN: Tensor
    C_LBN: Tensor
    D_I: Tensor | None
    z_LBI: Tensor | None
    dt_bias_I: Tensor | None
    starts_LB: Tensor | None

    def block(self, channels: slice) -> _Inputs:
        """Those of some channels."""
        return self._replace(
            x_LBI=self.x_LBI[..., channels],
            dt_LBI=self.dt_LBI[..., channels],
            A_IN=self.A_IN[channels],
            D_I=None if self.D_I is None else self.D_I[channels],
            z_LBI=None if self.z_LBI is None else self.z_LBI[..., channels],
            dt_bias_I=None if self.dt_bias_I is None else self.dt_bias_I[channels],
        )


class _Gradients(NamedTuple):
    """Gradients to fill in; those that are sums over positions or channels are added to, in working precision."""

    x_LBI: Tensor
    dt_LBI: Tensor
    A_NI: Tensor
    B_LBN: Tensor
    C_LBN: Tensor
    D_I: Tensor
    z_LBI: Tensor | None
    dt_bias_I: Tensor

    @classmethod
    def empty(cls, inputs: _Inputs, work: torch.dtype) -> _Gradients:
        def dense(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)

        inner, N = inputs.A_IN.shape
        return cls(
            dense(inputs.x_LBI),
            dense(inputs.dt_LBI),
            inputs.x_LBI.new_zeros(N, inner, dtype=work),
            inputs.B_LBN.new_zeros(inputs.B_LBN.shape, dtype=work),
            inputs.C_LBN.new_zeros(inputs.C_LBN.shape, dtype=work),
            inputs.x_LBI.new_zeros(inner, dtype=work),
            None if inputs.z_LBI is None else dense(inputs.z_LBI),
            inputs.x_LBI.new_zeros(inner, dtype=work),
        )

    def block(self, channels: slice) -> _Gradients:
        """Those of some channels."""
        return self._replace(
            x_LBI=self.x_LBI[..., channels],
            dt_LBI=self.dt_LBI[..., channels],
            A_NI=self.A_NI[:, channels],
            D_I=self.D_I[channels],
            z_LBI=None if self.z_LBI is None else self.z_LBI[..., channels],
            dt_bias_I=self.dt_bias_I[channels],
        )

    def like(self, inputs: _Inputs) -> tuple[Tensor | None, ...]:
        """In the order, shape and precision of the inputs before the document starts."""
        D, bias = inputs.D_I, inputs.dt_bias_I
        return (
            self.x_LBI,
            self.dt_LBI,
            self.A_NI.t().to(inputs.A_IN.dtype),
            self.B_LBN.to(inputs.B_LBN.dtype),
            self.C_LBN.to(inputs.C_LBN.dtype),
            None if D is None else self.D_I.to(D.dtype),
            self.z_LBI,
            None if bias is None else self.dt_bias_I.to(bias.dtype),
        )


def _forward(inputs: _Inputs, spans: list[Span], softplus: bool, states_KBNJ: Tensor, y_LBJ: Tensor) -> None:
    """Fill y and states[1:], the states entering each chunk and the final one, for one block of channels."""
    A_NJ, buffers = inputs.A_IN.to(states_KBNJ.dtype).t().contiguous(), _Buffers(y_LBJ)
    for span in spans:
        for slab, own in enumerate(span.slabs()):
            chunk = _Slab(inputs, span, slab, softplus, A_NJ, buffers)
            added_QRNJ = chunk.added()
            states = states_KBNJ[span.first + own.start : span.first + own.stop + 1]
            if chunk.chunks > 1:
                chunk.carry(states, added_QRNJ)
            h_QRNJ = chunk.scan(added_QRNJ, states[:-1].flatten(0, 1))
            if chunk.chunks == 1:
                states[1].copy_(h_QRNJ[-1])
            y_QRJ = chunk.read(h_QRNJ)
            if chunk.z is not None:
                y_QRJ.mul_(F.silu(chunk.z))
            _put(span.view(y_LBJ, slab), y_QRJ)


def _backward(
    inputs: _Inputs,
    spans: list[Span],
    softplus: bool,
    states_KBNJ: Tensor,
    dy_LBJ: Tensor,
    dstate_BNJ: Tensor,
    grads: _Gradients,
) -> Tensor:
    """Fill the gradients of one block of channels; returns that of the initial state, [B, N, J]."""
    A_NJ, buffers = inputs.A_IN.to(states_KBNJ.dtype).t().contiguous(), _Buffers(dy_LBJ)
    for span in reversed(spans):
        for slab, own in reversed([*enumerate(span.slabs())]):
            chunk = _Slab(inputs, span, slab, softplus, A_NJ, buffers)
            entering_RNJ = states_KBNJ[span.first + own.start : span.first + own.stop].flatten(0, 1)
            h_QRNJ = chunk.scan(chunk.added(), entering_RNJ)
            dy_QRJ = span.view(dy_LBJ, slab).flatten(1, 2).to(A_NJ.dtype)
            if grads.z_LBI is not None:
                assert chunk.z is not None
                gated_QRJ = chunk.read(h_QRNJ).mul_(dy_QRJ)
                _put(span.view(grads.z_LBI, slab), torch.ops.aten.silu_backward(gated_QRJ, chunk.z))
                dy_QRJ = dy_QRJ * F.silu(chunk.z)
            Q, R, N, J = h_QRNJ.shape
            dh_QRNJ = torch.mul(dy_QRJ[:, :, None], chunk.C[..., None], out=buffers.like(h_QRNJ, "dh"))
            product_QRNJ = torch.mul(h_QRNJ, dy_QRJ[:, :, None], out=buffers.like(h_QRNJ, "product"))
            _add(span.view(grads.C_LBN, slab), product_QRNJ.sum(-1))
            dstate_BNJ = chunk.scan_back(dh_QRNJ, dstate_BNJ)
            torch.mul(dh_QRNJ, chunk.u[:, :, None], out=product_QRNJ)
            _add(span.view(grads.B_LBN, slab), product_QRNJ.sum(-1))
            du_QRJ = torch.bmm(chunk.B.reshape(Q * R, 1, N), dh_QRNJ.view(Q * R, N, J)).view(Q, R, J)

            dlog_QRNJ = chunk.decay.mul_(dh_QRNJ)
            dlog_QRNJ[0].mul_(entering_RNJ)
            dlog_QRNJ[1:].mul_(h_QRNJ[:-1])
            ddt_QRJ = torch.mul(dlog_QRNJ, chunk.A_NJ, out=product_QRNJ).sum(2).addcmul_(du_QRJ, chunk.x)
            grads.A_NI.add_(dlog_QRNJ.mul_(chunk.dt[:, :, None]).sum((0, 1)))
            dx_QRJ = du_QRJ.mul_(chunk.dt)
            if chunk.D is not None:
                grads.D_I.add_((dy_QRJ * chunk.x).sum((0, 1)))
                dx_QRJ.addcmul_(dy_QRJ, chunk.D)
            if softplus:
                ddt_QRJ.mul_(chunk.raw_dt.sigmoid())
            if inputs.dt_bias_I is not None:
                grads.dt_bias_I.add_(ddt_QRJ.sum((0, 1)))
            _put(span.view(grads.x_LBI, slab), dx_QRJ)
            _put(span.view(grads.dt_LBI, slab), ddt_QRJ)
    return dstate_BNJ


class _Buffers:
    """Memory for the large tensors of a slab, used again for the next: fresh memory costs more than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self._device = like.device
        self._flat: dict[str, Tensor] = {}

    def get(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
        """An undefined dense tensor; the one got before under this name becomes invalid."""
        numel = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < numel:
            self._flat[name] = torch.empty(numel, dtype=dtype, device=self._device)
        return self._flat[name][:numel].view(shape)

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """As `get`."""
        return self.get(tuple(tensor.shape), tensor.dtype, name)


class _Slab:
    """One slab of one block of channels, in working precision, with [Q, R, ...] tensors.

    Attributes:
        x, dt, u, z: [Q, R, J]; u = dt x; raw_dt is the step size before softplus.
        B, C: [Q, R, N].
        A_NJ, D: of the channels.
        decay: exp(dt A), zero at the start of documents, [Q, R, N, J].
    """

    def __init__(self, inputs: _Inputs, span: Span, slab: int, softplus: bool, A_NJ: Tensor, buffers: _Buffers) -> None:
        work = A_NJ.dtype

        def cut(tensor_LBX: Tensor) -> Tensor:
            view = span.view(tensor_LBX, slab)
            self.chunks = view.shape[1]
            return view.flatten(1, 2).to(work)

        self.x, self.B, self.C = cut(inputs.x_LBI), cut(inputs.B_LBN), cut(inputs.C_LBN)
        self.z = None if inputs.z_LBI is None else cut(inputs.z_LBI)
        self.D = None if inputs.D_I is None else inputs.D_I.to(work)
        self.raw_dt = cut(inputs.dt_LBI)
        if inputs.dt_bias_I is not None:
            self.raw_dt = self.raw_dt + inputs.dt_bias_I.to(work)
        self.dt = F.softplus(self.raw_dt) if softplus else self.raw_dt
        self.u = self.dt * self.x
        self.A_NJ = A_NJ
        self.reset_QR = None if inputs.starts_LB is None else cut(inputs.starts_LB) * RESET
        shape = (*self.B.shape, self.x.shape[-1])
        self._buffer = buffers.get(shape, work, "states")
        self.decay = buffers.get(shape, work, "decay")
        if self.reset_QR is None:
            torch.mul(self.dt[:, :, None], self.A_NJ, out=self.decay)
        else:
            torch.addcmul(self.reset_QR[..., None, None], self.dt[:, :, None], self.A_NJ, out=self.decay)
        self.decay.exp_()

    def added(self) -> Tensor:
        """What each position adds to the state, [Q, R, N, J]."""
        return torch.mul(self.u[:, :, None], self.B[..., None], out=self._buffer)

    def scan(self, added_QRNJ: Tensor, entering_RNJ: Tensor) -> Tensor:
        """States after each position, in place of what each adds."""
        before = entering_RNJ
        for h, decay in zip(added_QRNJ.unbind(0), self.decay.unbind(0), strict=True):
            before = h.addcmul_(decay, before)
        return added_QRNJ

    def scan_back(self, dh_QRNJ: Tensor, dstate_BNJ: Tensor) -> Tensor:
        """Gradients of the state after each position, in place of those of its own read; `dstate_BNJ` is that of the
        state leaving the slab. Returns that of the state entering it.
        """
        if self.chunks == 1:
            dh_QRNJ[-1].add_(dstate_BNJ)
        else:
            local = torch.zeros_like(dh_QRNJ[0])
            for dh, decay in zip(reversed(dh_QRNJ.unbind(0)), reversed(self.decay.unbind(0)), strict=True):
                local.add_(dh).mul_(decay)
            per_chunk = local.unflatten(0, (self.chunks, -1))
            leaving, total = torch.empty_like(per_chunk), self._total()
            for k in reversed(range(self.chunks)):
                leaving[k] = dstate_BNJ
                dstate_BNJ = torch.addcmul(per_chunk[k], dstate_BNJ, total[k])
            dh_QRNJ[-1].add_(leaving.flatten(0, 1))
        rows, decays = dh_QRNJ.unbind(0), self.decay.unbind(0)
        for q in reversed(range(1, len(rows))):
            rows[q - 1].addcmul_(decays[q], rows[q])
        return decays[0] * rows[0] if self.chunks == 1 else dstate_BNJ

    def carry(self, states_KBNJ: Tensor, added_QRNJ: Tensor) -> None:
        """Fill states[1:], those leaving each chunk of the slab."""
        local = torch.zeros_like(added_QRNJ[0])
        for added, decay in zip(added_QRNJ.unbind(0), self.decay.unbind(0), strict=True):
            local.mul_(decay).add_(added)
        per_chunk, total = local.unflatten(0, (self.chunks, -1)), self._total()
        for k in range(self.chunks):
            torch.addcmul(per_chunk[k], states_KBNJ[k], total[k], out=states_KBNJ[k + 1])

    def read(self, h_QRNJ: Tensor) -> Tensor:
        """C . state + D x, [Q, R, J]."""
        Q, R, N, J = h_QRNJ.shape
        y = torch.bmm(self.C.reshape(Q * R, 1, N), h_QRNJ.view(Q * R, N, J)).view(Q, R, J)
        return y if self.D is None else y.addcmul_(self.x, self.D)

    def _total(self) -> Tensor:
        """Decay over whole chunks [K, B, N, J]."""
        exponent = self.dt.sum(0)[:, None] * self.A_NJ
        if self.reset_QR is not None:
            exponent += self.reset_QR.sum(0)[:, None, None]
        return exponent.exp_().unflatten(0, (self.chunks, -1))


def _chunks_at_once(device: torch.device, position_numbers: int) -> int | None:
    """Chunks per slab; None = all."""
    if device.type != "cpu":
        return None
    at_once = CPU_POSITION_NUMBERS // position_numbers
    return at_once if at_once > 2 else 1


def _channel_blocks(spans: list[Span], device: torch.device, B: int, N: int, inner: int) -> Iterator[slice]:
    """Equal blocks of channels whose buffers stay in the cache, or in reasonable memory on an accelerator."""
    if device.type == "cpu":
        wanted = CPU_POSITION_NUMBERS // (B * N)
    else:
        wanted = ACCELERATOR_SLAB_NUMBERS // max(span.length * span.chunks_at_once * B * N for span in spans)
    blocks = -(-inner // max(wanted, 64))
    size = -(-inner // blocks)
    for start in range(0, inner, size):
        yield slice(start, min(start + size, inner))


def _put(target_QKBX: Tensor, values_QRX: Tensor) -> None:
    target_QKBX.copy_(values_QRX.view_as(target_QKBX))


def _add(target_QKBX: Tensor, values_QRX: Tensor) -> None:
    target_QKBX.add_(values_QRX.view_as(target_QKBX))
