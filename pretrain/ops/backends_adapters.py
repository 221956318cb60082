"""Other libraries' GPU kernels behind the signatures of our own operations.

Each adapter says why it cannot serve a call (`obstacle`, None when it can) and calls the library's function by keyword.
Legend: L = sequence length, B = batch, H = heads, P = head dim, G = groups, N = state size, I = channels of Mamba-1,
C = convolved channels, K = kernel width. Ours is sequence-first, theirs batch-first; nothing is copied on the way in
unless a kernel asks for another layout.

Sources (signatures and layouts): state-spaces/mamba 2.2-2.3, Dao-AILab/causal-conv1d 1.4-1.6,
fla-org/flash-linear-attention 0.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.ops.spans import document_numbers, document_starts

Function = Callable[..., Any]

_ALIGNMENT = 8  # numbers; causal-conv1d loads so many at once


class MambaSSD:
    """`mamba_chunk_scan_combined`: packed documents, initial and final states with gradients."""

    distribution = "mamba-ssm"
    module = "mamba_ssm.ops.triton.ssd_combined"
    name = "mamba_chunk_scan_combined"
    parameters = ("x", "dt", "A", "B", "C", "chunk_size", "D", "initial_states", "seq_idx", "return_final_states")

    @staticmethod
    def obstacle(*, x_LBHP: Tensor, **_: Any) -> str | None:
        return _double(x_LBHP)

    @staticmethod
    def call(
        function: Function,
        *,
        x_LBHP: Tensor,
        dt_LBH: Tensor,
        A_H: Tensor,
        B_LBGN: Tensor,
        C_LBGN: Tensor,
        D_H: Tensor | None,
        seq_idx_LB: Tensor | None,
        initial_state_BHPN: Tensor | None,
        chunk_size: int,
        need_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # Triton takes chunks of 16 to 256 positions, powers of two; the result does not depend on it.
        chunk_size = min(max(1 << (chunk_size - 1).bit_length(), 16), 256)
        result = function(
            x=x_LBHP.transpose(0, 1),
            dt=dt_LBH.transpose(0, 1),
            A=A_H.float(),
            B=B_LBGN.transpose(0, 1),
            C=C_LBGN.transpose(0, 1),
            chunk_size=chunk_size,
            D=None if D_H is None else D_H.float(),
            initial_states=None if initial_state_BHPN is None else initial_state_BHPN.float(),
            seq_idx=_kernel_documents(seq_idx_LB),
            return_final_states=need_state,
        )
        y_BLHP, state_BHPN = result if need_state else (result, None)
        return y_BLHP.transpose(0, 1), state_BHPN


class FlaSSD:
    """`chunk_simple_gla`, linear attention with one decay per head: SSD with q = C, k = B, v = dt x, g = dt A.

    Heads of a group are written out, and packed documents are laid end to end in a batch of one.
    """

    distribution = "flash-linear-attention"
    module = "fla.ops.simple_gla"
    name = "chunk_simple_gla"
    parameters = ("q", "k", "v", "g", "scale", "initial_state", "output_final_state", "cu_seqlens")

    @staticmethod
    def obstacle(
        *, x_LBHP: Tensor, seq_idx_LB: Tensor | None, initial_state_BHPN: Tensor | None, **_: Any
    ) -> str | None:
        if seq_idx_LB is not None and initial_state_BHPN is not None:
            return "packed documents with an initial state are not adapted to it"
        return _double(x_LBHP)

    @staticmethod
    def call(
        function: Function,
        *,
        x_LBHP: Tensor,
        dt_LBH: Tensor,
        A_H: Tensor,
        B_LBGN: Tensor,
        C_LBGN: Tensor,
        D_H: Tensor | None,
        seq_idx_LB: Tensor | None,
        initial_state_BHPN: Tensor | None,
        chunk_size: int,
        need_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        L, B, H, _ = x_LBHP.shape
        heads = H // B_LBGN.shape[2]
        dt_LBH = dt_LBH.float()
        written_LBHP = (x_LBHP.float() * dt_LBH[..., None]).to(x_LBHP.dtype)
        inputs = (
            C_LBGN.to(x_LBHP.dtype).repeat_interleave(heads, dim=2),
            B_LBGN.to(x_LBHP.dtype).repeat_interleave(heads, dim=2),
            written_LBHP,
            dt_LBH * A_H.float(),
        )
        offsets, last = None, None
        batch_first = [t.transpose(0, 1) for t in inputs]
        if seq_idx_LB is not None:
            batch_first = [t.reshape(1, B * L, *t.shape[2:]) for t in batch_first]
            starts_BL = document_starts(seq_idx_LB).t().clone()
            starts_BL[:, 0] = True
            first = starts_BL.reshape(-1).nonzero().squeeze(1)
            offsets = torch.cat([first, first.new_tensor([B * L])])
            last = starts_BL.sum(1).cumsum(0) - 1  # the last document of each row
        q, k, v, g = batch_first
        y, state = function(
            q=q,
            k=k,
            v=v,
            g=g,
            scale=1.0,
            initial_state=None if initial_state_BHPN is None else initial_state_BHPN.float().mT.contiguous(),
            output_final_state=need_state,
            cu_seqlens=offsets,
        )
        y_LBHP = y.reshape(B, L, *y.shape[2:]).transpose(0, 1)
        if D_H is not None:
            y_LBHP = (y_LBHP.float() + D_H.float()[:, None] * x_LBHP.float()).to(x_LBHP.dtype)
        if not need_state:
            return y_LBHP, None
        return y_LBHP, (state if last is None else state[last]).mT


class MambaSelectiveScan:
    """`selective_scan_fn`: softplus and gate inside; no document boundaries, no initial state, and its final state
    carries no gradient.
    """

    distribution = "mamba-ssm"
    module = "mamba_ssm.ops.selective_scan_interface"
    name = "selective_scan_fn"
    parameters = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state")

    @staticmethod
    def obstacle(
        *,
        x_LBI: Tensor,
        A_IN: Tensor,
        seq_idx_LB: Tensor | None,
        initial_state_BIN: Tensor | None,
        need_state: bool,
        **_: Any,
    ) -> str | None:
        if seq_idx_LB is not None:
            return "it knows no document boundaries (packed sequences)"
        if initial_state_BIN is not None:
            return "it takes no initial state"
        if need_state and torch.is_grad_enabled():
            return "its final state carries no gradient"
        if A_IN.shape[1] > 256:
            return f"it holds at most 256 states a channel, not {A_IN.shape[1]}"
        return _double(x_LBI)

    @staticmethod
    def call(
        function: Function,
        *,
        x_LBI: Tensor,
        dt_LBI: Tensor,
        A_IN: Tensor,
        B_LBN: Tensor,
        C_LBN: Tensor,
        D_I: Tensor | None,
        z_LBI: Tensor | None,
        dt_bias_I: Tensor | None,
        dt_softplus: bool,
        seq_idx_LB: Tensor | None,
        initial_state_BIN: Tensor | None,
        chunk_size: int,
        need_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        def channels_first(tensor_LBX: Tensor) -> Tensor:
            return tensor_LBX.to(x_LBI.dtype).permute(1, 2, 0).contiguous()

        result = function(
            u=channels_first(x_LBI),
            delta=channels_first(dt_LBI),
            A=A_IN.float().contiguous(),
            B=channels_first(B_LBN),
            C=channels_first(C_LBN),
            D=None if D_I is None else D_I.float(),
            z=None if z_LBI is None else channels_first(z_LBI),
            delta_bias=None if dt_bias_I is None else dt_bias_I.float(),
            delta_softplus=dt_softplus,
            return_last_state=need_state,
        )
        y_BIL, state_BIN = result if need_state else (result, None)
        return y_BIL.permute(2, 0, 1), state_BIN


class CausalConv1d:
    """`causal_conv1d_fn`: filters of 2 to 4 taps; document boundaries in the channels-last layout, which is ours."""

    distribution = "causal-conv1d"
    module = "causal_conv1d"
    name = "causal_conv1d_fn"
    parameters = ("x", "weight", "bias", "seq_idx", "activation")

    @staticmethod
    def obstacle(*, x_LBC: Tensor, weight_CK: Tensor, initial_state_KBC: Tensor | None, **_: Any) -> str | None:
        if initial_state_KBC is not None:
            return "initial states are not adapted to it"
        if not 2 <= weight_CK.shape[1] <= 4:
            return f"it has 2 to 4 taps, not {weight_CK.shape[1]}"
        if x_LBC.shape[2] % _ALIGNMENT:
            return f"it needs a multiple of {_ALIGNMENT} channels, not {x_LBC.shape[2]}"
        return _double(x_LBC)

    @staticmethod
    def call(
        function: Function,
        *,
        x_LBC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor | None,
        seq_idx_LB: Tensor | None,
        initial_state_KBC: Tensor | None,
    ) -> Tensor:
        aligned = all(stride % _ALIGNMENT == 0 for stride in x_LBC.stride()[:2]) and x_LBC.stride(2) == 1
        if not aligned or x_LBC.storage_offset() % _ALIGNMENT:
            x_LBC = x_LBC.clone(memory_format=torch.contiguous_format)
        y_BCL = function(
            x=x_LBC.permute(1, 2, 0),
            weight=weight_CK,
            bias=None if bias_C is None else bias_C.to(weight_CK.dtype),
            seq_idx=_kernel_documents(seq_idx_LB),
            activation="silu",
        )
        return y_BCL.permute(2, 0, 1)


class MambaGatedNorm:
    """`rmsnorm_fn` with the gate before the norm."""

    distribution = "mamba-ssm"
    module = "mamba_ssm.ops.triton.layernorm_gated"
    name = "rmsnorm_fn"
    parameters = ("x", "weight", "bias", "z", "eps", "group_size", "norm_before_gate")

    @staticmethod
    def obstacle(*, y: Tensor, num_groups: int, **_: Any) -> str | None:
        size = y.shape[-1] // num_groups
        if size * y.element_size() > 65536:
            return f"it norms at most 64 KiB at a time, not {size} features of {y.element_size()} bytes"
        return _double(y)

    @staticmethod
    def call(function: Function, *, y: Tensor, z: Tensor, weight_D: Tensor, num_groups: int, eps: float) -> Tensor:
        result: Tensor = function(
            x=y,
            weight=weight_D,
            bias=None,
            z=z,
            eps=eps,
            group_size=y.shape[-1] // num_groups,
            norm_before_gate=False,
        )
        return result


def _double(tensor: Tensor) -> str | None:
    return "it does not compute in float64" if tensor.dtype == torch.float64 else None


def _kernel_documents(seq_idx_LB: Tensor | None) -> Tensor | None:
    """Document numbers as kernels take them: int32 [B, L], from 0, never returning to an earlier number (they compare
    numbers of distant positions, and take a negative one for padding).
    """
    return None if seq_idx_LB is None else document_numbers(seq_idx_LB).t().to(torch.int32).contiguous()
