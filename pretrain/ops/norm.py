"""RMSNorm, plain and gated, and LayerNorm, in float32 with backward passes that keep only their inputs.

Legend: L = sequence length, B = batch, D = width, G = groups. Any number of leading dimensions is accepted.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467); the gated form is the
normalisation before Mamba-2's output projection (arXiv 2405.21060, section 7): gate first, norm second, and the
mean square over each of G equal parts of the width, so that G-way tensor parallelism needs no exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.blocks import arithmetic_dtype, row_blocks


def rms_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2 over the last dimension) + eps) * weight, in ``dtype`` (None: that of x).

    Raises:
        ValueError: when weight does not have the width of x.
    """
    return _norm(x, None, weight_D, 1, eps, dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight_D: Tensor, num_groups: int = 1, eps: float = 1e-5) -> Tensor:
    """RMSNorm over each of num_groups parts of y * silu(z), times weight, in the precision of y.

    Args:
        y, z: [..., D]; z may be a strided slice of a packed projection.
        weight_D: scale.
        num_groups: number of equal parts of D that are normalised each by itself.

    Raises:
        ValueError: when the shapes differ, or num_groups does not divide D.
    """
    if y.shape != z.shape:
        raise ValueError(f"gated_rms_norm: y is {tuple(y.shape)} but its gate z is {tuple(z.shape)}")
    return _norm(y, z, weight_D, num_groups, eps, None)


def layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, computed in float32 (float64 for
    float64 inputs), in ``dtype`` (None: that of x). Source: Ba et al., arXiv 1607.06450.

    Raises:
        ValueError: when weight or bias does not have the width of x.
    """
    width, work = x.shape[-1], arithmetic_dtype(x.dtype)
    for name, vector in (("weight", weight_D), ("bias", bias_D)):
        if vector.shape != (width,):
            raise ValueError(f"layer_norm: {name} has shape {tuple(vector.shape)}, expected ({width},)")
    weight_D, bias_D = weight_D.to(work), bias_D.to(work)
    if x.dtype == work and dtype in (None, work):
        return torch.nn.functional.layer_norm(x, (width,), weight_D, bias_D, eps)
    return _LayerNorm.apply(x.reshape(-1, width), weight_D, bias_D, eps, dtype or x.dtype).view(x.shape)


def _norm(
    x: Tensor, z: Tensor | None, weight_D: Tensor, num_groups: int, eps: float, dtype: torch.dtype | None
) -> Tensor:
    width = x.shape[-1]
    if weight_D.shape != (width,):
        raise ValueError(f"rms_norm: weight has shape {tuple(weight_D.shape)}, expected ({width},)")
    if num_groups < 1 or width % num_groups:
        raise ValueError(f"rms_norm: {num_groups} groups do not divide the width {width}")
    flat_z = None if z is None else z.reshape(-1, width)
    return _RMSNorm.apply(x.reshape(-1, width), flat_z, weight_D, num_groups, eps, dtype or x.dtype).view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        z_RD: Tensor | None,
        weight_D: Tensor,
        num_groups: int,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        work = arithmetic_dtype(x_RD.dtype)
        rows, width = x_RD.shape
        weight = weight_D.to(work)
        out_RD = torch.empty_like(x_RD, dtype=dtype, memory_format=torch.contiguous_format)
        rstd_RG = x_RD.new_empty(rows, num_groups, 1, dtype=work)
        for start, stop in row_blocks(0, rows, width, x_RD.device):
            gated, _ = _gate(x_RD, z_RD, start, stop, work)
            parts = gated.view(-1, num_groups, width // num_groups)
            rstd = rstd_RG[start:stop]
            torch.mean(parts * parts, dim=-1, keepdim=True, out=rstd)
            rstd.add_(eps).rsqrt_()
            out_RD[start:stop] = (parts * rstd).view_as(gated).mul_(weight)
        ctx.save_for_backward(x_RD, z_RD, weight_D, rstd_RG)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, z_RD, weight_D, rstd_RG = ctx.saved_tensors
        work = rstd_RG.dtype
        rows, width = x_RD.shape
        num_groups = rstd_RG.shape[1]
        size = width // num_groups
        weight = weight_D.to(work)
        dx_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
        dz_RD = None if z_RD is None else torch.empty_like(z_RD, memory_format=torch.contiguous_format)
        dweight = torch.zeros_like(weight)
        for start, stop in row_blocks(0, rows, width, x_RD.device):
            rstd = rstd_RG[start:stop]
            gated, gate = _gate(x_RD, z_RD, start, stop, work)
            dout = dout_RD[start:stop].to(work).contiguous()
            normed = gated.view(-1, num_groups, size) * rstd
            product = dout * normed.view_as(gated)
            dweight += product.sum(0)
            mean = product.mul_(weight).view_as(normed).mean(-1, keepdim=True)
            # d(gated) = rstd (weight dout - normed mean(weight dout normed))
            dgated = normed.mul_(mean.neg_()).addcmul_(dout.view_as(normed), weight.view(num_groups, size))
            dgated = dgated.mul_(rstd).view_as(gated)
            if z_RD is None or dz_RD is None or gate is None:
                dx_RD[start:stop] = dgated
            else:
                dgate = dgated * x_RD[start:stop]
                dz_RD[start:stop] = torch.ops.aten.silu_backward(dgate, z_RD[start:stop].to(work))
                dx_RD[start:stop] = dgated.mul_(gate)
        return dx_RD, dz_RD, dweight.to(weight_D.dtype), None, None, None


def _gate(x_RD: Tensor, z_RD: Tensor | None, start: int, stop: int, work: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows of x * silu(z) as a dense tensor, and the gate."""
    x = x_RD[start:stop].to(work)
    if z_RD is None:
        return x.contiguous(), None
    gate = torch.nn.functional.silu(z_RD[start:stop].to(work)).contiguous()
    return gate * x, gate


class _LayerNorm(torch.autograd.Function):
    """Torch's, for inputs or results that are not in the precision of the arithmetic: keeps the input as it came."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows, width = x_RD.shape
        out_RD = torch.empty_like(x_RD, dtype=dtype, memory_format=torch.contiguous_format)
        mean_R1, rstd_R1 = (x_RD.new_empty(rows, 1, dtype=weight_D.dtype) for _ in range(2))
        for start, stop in row_blocks(0, rows, width, x_RD.device):
            part = x_RD[start:stop].to(weight_D.dtype)
            normed, mean, rstd = torch.native_layer_norm(part, [width], weight_D, bias_D, eps)
            out_RD[start:stop], mean_R1[start:stop], rstd_R1[start:stop] = normed, mean, rstd
        ctx.save_for_backward(x_RD, weight_D, bias_D, mean_R1, rstd_R1)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_D, bias_D, mean_R1, rstd_R1 = ctx.saved_tensors
        rows, width = x_RD.shape
        dx_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
        dweight_D, dbias_D = torch.zeros_like(weight_D), torch.zeros_like(bias_D)
        for start, stop in row_blocks(0, rows, width, x_RD.device):
            part, dout = x_RD[start:stop].to(weight_D.dtype), dout_RD[start:stop].to(weight_D.dtype)
            mean, rstd = mean_R1[start:stop], rstd_R1[start:stop]
            dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
                dout, part, [width], mean, rstd, weight_D, bias_D, [True, True, True]
            )
            dx_RD[start:stop] = dx
            dweight_D += dweight
            dbias_D += dbias
        return dx_RD, dweight_D, dbias_D, None, None
