"""Matrix products of many experts at once: each row is multiplied with the matrix of the expert that it is sent to.

Rows are sorted by expert once (:func:`dispatch`); then every product works on one contiguous run of rows for each
expert. No row is dropped, and an expert without rows gets zero gradients rather than none. On CUDA in bf16 the products
are torch's grouped matrix products, which read the runs' ends on the device, so that the host never waits; elsewhere
they are a loop over the runs. The backward passes are written out: rows are gathered again rather than kept, and the
weights themselves are kept rather than views of them (which would keep what ZeRO stage 3 has gathered).

Legend: R = rows (tokens), K = experts of a row, S = R * K slots sorted by expert, E = experts, D = width of the rows,
F = features of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from pretrain.ops.blocks import arithmetic_dtype, row_blocks

ACTIVATIONS = ("swiglu", "gelu", "relu2")


@dataclass(frozen=True)
class Dispatch:
    """Where the rows go. All tensors are int64 but ``ends_E``, and live on the rows' device.

    Attributes:
        row_S: row of each slot; slots are sorted by expert, those of an expert by row.
        order_S: the entry of the flattened [R, K] that each slot comes from.
        slot_RK: the slot of each entry.
        ends_E: int32, one past the last slot of each expert.
    """

    row_S: Tensor
    order_S: Tensor
    slot_RK: Tensor
    ends_E: Tensor


def dispatch(experts_RK: Tensor, num_experts: int) -> Dispatch:
    """Sort the rows by the experts that they are sent to, without waiting for the device.

    Args:
        experts_RK: int64 in [0, num_experts), no expert twice in a row.
    """
    sorted_S, order_S = experts_RK.flatten().sort(stable=True)
    slot_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    every_E = torch.arange(num_experts, device=sorted_S.device)
    ends_E = torch.searchsorted(sorted_S, every_E, right=True, out_int32=True)
    return Dispatch(order_S // experts_RK.shape[1], order_S, slot_S.view_as(experts_RK), ends_E)


def expert_in(x_RD: Tensor, weight_EFD: Tensor, plan: Dispatch) -> Tensor:
    """Each slot's row times the transposed matrix of its expert: h_SF."""
    return _ExpertIn.apply(x_RD, weight_EFD, plan.row_S, plan.slot_RK, plan.ends_E)


def expert_out(h_SF: Tensor, weight_EDF: Tensor, plan: Dispatch) -> Tensor:
    """Each slot times the transposed matrix of its expert, added up over the slots of a row: y_RD."""
    return _ExpertOut.apply(h_SF, weight_EDF, plan.row_S, plan.slot_RK, plan.ends_E)


def weighted_activation(activation: str, up_SF: Tensor, gate_SF: Tensor | None, weight_S: Tensor) -> Tensor:
    """Activation of each slot times its routing weight, computed in fp32, in the precision of ``up_SF``.

    ``swiglu``: silu(gate) * up; ``gelu``: gelu(up); ``relu2``: relu(up)^2; no gate but for ``swiglu``. The weight may
    be applied before the second projection, which is linear and has no bias; so no product of it need be kept.
    """
    assert activation in ACTIVATIONS, activation
    assert (gate_SF is not None) == (activation == "swiglu"), "the gate belongs to swiglu"
    return _WeightedActivation.apply(activation, up_SF, gate_SF, weight_S)


class _ExpertIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_EFD: Tensor, row_S: Tensor, slot_RK: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EFD, row_S, slot_RK, ends_E)
        return _rows_times(x_RD.index_select(0, row_S), weight_EFD.transpose(1, 2), ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_SF: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_EFD, row_S, slot_RK, ends_E = ctx.saved_tensors
        dh_SF = dh_SF.contiguous()
        dx_RD = dweight_EFD = None
        if ctx.needs_input_grad[0]:
            dx_RD = _gather_sum(_rows_times(dh_SF, weight_EFD, ends_E), slot_RK)
        if ctx.needs_input_grad[1]:
            dweight_EFD = _outer(dh_SF, x_RD.index_select(0, row_S), ends_E)
        return dx_RD, dweight_EFD, None, None, None


class _ExpertOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_SF: Tensor, weight_EDF: Tensor, row_S: Tensor, slot_RK: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(h_SF, weight_EDF, row_S, ends_E)
        return _gather_sum(_rows_times(h_SF.contiguous(), weight_EDF.transpose(1, 2), ends_E), slot_RK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        h_SF, weight_EDF, row_S, ends_E = ctx.saved_tensors
        dy_SD = dy_RD.index_select(0, row_S)
        dh_SF = _rows_times(dy_SD, weight_EDF, ends_E) if ctx.needs_input_grad[0] else None
        dweight_EDF = _outer(dy_SD, h_SF.contiguous(), ends_E) if ctx.needs_input_grad[1] else None
        return dh_SF, dweight_EDF, None, None, None


class _WeightedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: str, up_SF: Tensor, gate_SF: Tensor | None, weight_S: Tensor) -> Tensor:
        ctx.save_for_backward(up_SF, gate_SF, weight_S)
        ctx.activation = activation
        out_SF = torch.empty_like(up_SF, memory_format=torch.contiguous_format)
        for up, gate, weight, block in _activation_blocks(up_SF, gate_SF, weight_S):
            out_SF[block] = _activate(activation, up, gate).mul_(weight)
        return out_SF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_SF: Tensor) -> tuple[Tensor | None, ...]:
        up_SF, gate_SF, weight_S = ctx.saved_tensors
        dup_SF = torch.empty_like(up_SF, memory_format=torch.contiguous_format)
        dgate_SF = None if gate_SF is None else torch.empty_like(dup_SF)
        dweight_S = torch.empty_like(weight_S, dtype=arithmetic_dtype(up_SF.dtype))
        for up, gate, weight, block in _activation_blocks(up_SF, gate_SF, weight_S):
            dout = dout_SF[block].to(up.dtype)
            dweight_S[block] = (_activate(ctx.activation, up, gate).mul_(dout)).sum(1)
            dout = dout * weight
            if gate is not None and dgate_SF is not None:
                dup_SF[block] = F.silu(gate).mul_(dout)
                dgate_SF[block] = torch.ops.aten.silu_backward(dout.mul_(up), gate)
            elif ctx.activation == "gelu":
                dup_SF[block] = torch.ops.aten.gelu_backward(dout, up)
            else:
                dup_SF[block] = F.relu(up).mul_(2).mul_(dout)
        return None, dup_SF, dgate_SF, dweight_S.to(weight_S.dtype)


def _activation_blocks(
    up_SF: Tensor, gate_SF: Tensor | None, weight_S: Tensor
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, slice]]:
    """(up, gate, weight [rows, 1], rows) in fp32, in blocks that stay in the CPU's cache."""
    work = arithmetic_dtype(up_SF.dtype)
    for start, stop in row_blocks(0, len(up_SF), up_SF.shape[1], up_SF.device):
        gate = None if gate_SF is None else gate_SF[start:stop].to(work)
        block = slice(start, stop)
        yield up_SF[block].to(work), gate, weight_S[block].to(work).unsqueeze(1), block


def _activate(activation: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """A new tensor, without the routing weight."""
    if gate is not None:
        return F.silu(gate).mul_(up)
    return F.gelu(up) if activation == "gelu" else F.relu(up).square_()


def _gather_sum(y_SD: Tensor, slot_RK: Tensor) -> Tensor:
    """Sum of the slots of each row, always in the same order."""
    rows, top_k = slot_RK.shape
    gathered = y_SD.index_select(0, slot_RK.flatten())
    return gathered if top_k == 1 else gathered.view(rows, top_k, -1).sum(1)


def _rows_times(x_SM: Tensor, matrix_EMN: Tensor, ends_E: Tensor) -> Tensor:
    """Each run of rows times its expert's matrix (M inputs, N outputs): y_SN."""
    if uses_grouped_mm(x_SM, matrix_EMN):
        return F.grouped_mm(x_SM, matrix_EMN, offs=ends_E)
    y_SN = x_SM.new_empty(len(x_SM), matrix_EMN.shape[2])
    for expert, start, stop in _runs(ends_E):
        torch.mm(x_SM[start:stop], matrix_EMN[expert], out=y_SN[start:stop])
    return y_SN


def _outer(a_SM: Tensor, b_SN: Tensor, ends_E: Tensor) -> Tensor:
    """Sum over each run of the outer products of its rows: [E, M, N], zero for an expert without rows."""
    if uses_grouped_mm(a_SM, b_SN):
        sums_EMN = F.grouped_mm(a_SM.t(), b_SN, offs=ends_E)
        # Some kernels leave an empty group as they found the memory (pytorch issue 172439).
        sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        return sums_EMN.masked_fill_((sizes_E == 0).view(-1, 1, 1), 0.0)
    sums_EMN = a_SM.new_zeros(len(ends_E), a_SM.shape[1], b_SN.shape[1])
    for expert, start, stop in _runs(ends_E):
        torch.mm(a_SM[start:stop].t(), b_SN[start:stop], out=sums_EMN[expert])
    return sums_EMN


def _runs(ends_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first slot, end) of each expert that has slots; on a device the host waits for the ends."""
    start = 0
    for expert, stop in enumerate(ends_E.tolist()):
        if stop > start:
            yield expert, start, stop
        start = stop


def uses_grouped_mm(*operands: Tensor) -> bool:
    """Whether torch's grouped product takes these: bf16 on CUDA of compute capability 8.0 or later, 16-byte rows."""
    if not hasattr(F, "grouped_mm") or any(x.device.type != "cuda" or x.dtype != torch.bfloat16 for x in operands):
        return False
    aligned = all(size % 8 == 0 for x in operands for size in x.shape[1:])
    return aligned and torch.cuda.get_device_capability(operands[0].device) >= (8, 0)
