"""Mamba-1 mixer (Gu & Dao, arXiv 2312.00752).

Shapes: L = sequence length, B = batch, D = model width, I = inner channels, N = states of a channel, R = rank of the
step sizes, K = conv kernel width. Channels are split over tensor-parallel ranks: inside a mixer I counts what this rank
holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pretrain.nn.initialisation import Initialiser, constant, inverse_softplus_step, log_count, normal, uniform
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mamba1_config import Mamba1Config
from pretrain.nn.short_conv import ShortConv
from pretrain.ops import backends
from pretrain.ops.blocks import arithmetic_dtype
from pretrain.ops.conv import causal_conv_final_state, causal_conv_step
from pretrain.ops.selective_scan import selective_scan_step
from pretrain.parallel.layers import ParallelLayers, exempt_from_muon, exempt_from_weight_decay, keep_fp32


@dataclass
class Mamba1Cache:
    """Constant-size generation state: the last K - 1 convolution inputs, and the SSM state (fp32)."""

    conv_state_KBI: Tensor
    ssm_state_BIN: Tensor


class InnerLinear(nn.Module):
    """A linear layer without bias between split and unsplit features inside a mixer: this rank's share of its
    matrix.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.canonical_components: dict[str, dict[str, int]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """[..., columns] -> [..., rows]."""
        return F.linear(x, self.weight)


class Mamba1Mixer(nn.Module):
    """Selective state-space mixer: x_LBD -> y_LBD.

    One projection gives input x and gate z; a causal convolution with SiLU runs over x; from its output a small
    projection makes R features, B and C, and a second one the step sizes from those features. The recurrence
    h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, y_t = C_t h_t + D x_t follows for each channel, then the gate
    y silu(z) and the output projection. State and convolution restart at document boundaries.

    Args:
        width: D.
        config: sizes of the whole model.
    """

    def __init__(self, layers: ParallelLayers, width: int, config: Mamba1Config) -> None:
        super().__init__()
        inner = config.inner(width)
        self.inner = layers.local(inner)
        self.rank = config.rank(width)
        self.state_dim = config.state_dim
        self.conv_kernel = config.conv_kernel
        self.chunk_size = config.chunk_size
        self._parallel = layers
        self.in_proj = layers.fused_column(width, {"x": inner, "z": inner}, bias=config.proj_bias)
        self.conv = ShortConv(layers, {"x": inner}, config.conv_kernel, config.conv_bias)
        shared = self.rank + 2 * config.state_dim
        self.x_proj = InnerLinear(layers.own(nn.Parameter(torch.empty(shared, self.inner)), dim=1))
        self.x_proj.canonical_components = {"weight": {"dt": self.rank, "B": config.state_dim, "C": config.state_dim}}
        self.dt_proj = InnerLinear(layers.own(nn.Parameter(torch.empty(self.inner, self.rank))))
        self.dt_bias, self.A_log, self.D = (
            layers.own(keep_fp32(exempt_from_muon(exempt_from_weight_decay(nn.Parameter(torch.empty(*shape))))))
            for shape in ((self.inner,), (self.inner, config.state_dim), (self.inner,))
        )
        self.out_proj = layers.row(inner, width, bias=config.proj_bias)

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """Normal projections, A = -(1 .. N) for every channel, D = 1, step sizes log-uniform in [0.001, 0.1) whatever
        their features (whose matrix is uniform within R^-1/2), convolution as ``torch.nn.Conv1d``.
        """
        initialisers = {
            "in_proj.weight": normal(std),
            **{f"conv.{name}": fill for name, fill in self.conv.initialisers().items()},
            "x_proj.weight": normal(std),
            "dt_proj.weight": uniform(1 / math.sqrt(self.rank)),
            "dt_bias": inverse_softplus_step(1e-3, 0.1, floor=1e-4),
            "A_log": log_count(),
            "D": constant(1.0),
            "out_proj.weight": normal(out_std),
        }
        if self.in_proj.bias is not None:
            initialisers |= {"in_proj.bias": constant(0.0), "out_proj.bias": constant(0.0)}
        return initialisers

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Mamba1Cache:
        """Zero state."""
        conv_shape = (self.conv_kernel - 1, batch_size, self.inner)
        ssm_shape = (batch_size, self.inner, self.state_dim)
        return Mamba1Cache(
            torch.zeros(conv_shape, dtype=dtype, device=device),
            torch.zeros(ssm_shape, dtype=arithmetic_dtype(dtype), device=device),
        )

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: Mamba1Cache | None = None) -> Tensor:
        """Mix.

        With a cache, continue from it and update it: either a whole prompt into an empty cache, or one position at a
        time.
        """
        x_LBI, z_LBI = self.in_proj(x_LBD).split(self.inner, dim=-1)
        if cache is not None and len(x_LBD) == 1:
            y_LBI = self._step(x_LBI[0], z_LBI[0], cache).unsqueeze(0)
        else:
            y_LBI = self._scan(x_LBI, z_LBI, layout, cache)
        return self.out_proj(y_LBI)

    def _scan(self, x_LBI: Tensor, z_LBI: Tensor, layout: SequenceLayout, cache: Mamba1Cache | None) -> Tensor:
        """Whole sequences; with an empty cache, leave the final state in it."""
        segments = layout.seq_idx_LB
        if cache is not None:
            cache.conv_state_KBI = causal_conv_final_state(x_LBI, self.conv_kernel)
        x_LBI = backends.causal_conv(x_LBI, self.conv.weight, self.conv.bias, seq_idx_LB=segments)
        dt_LBI, B_LBN, C_LBN = self._selected(x_LBI)
        y_LBI, state_BIN = backends.selective_scan(
            x_LBI,
            dt_LBI,
            self._decay(),
            B_LBN,
            C_LBN,
            self.D,
            z_LBI=z_LBI,
            dt_bias_I=self.dt_bias,
            dt_softplus=True,
            seq_idx_LB=segments,
            chunk_size=self.chunk_size,
            need_state=cache is not None,
        )
        if cache is not None:
            assert state_BIN is not None
            cache.ssm_state_BIN = state_BIN
        return y_LBI

    def _step(self, x_BI: Tensor, z_BI: Tensor, cache: Mamba1Cache) -> Tensor:
        """One position: [B, I] -> y [B, I]."""
        x_BI, cache.conv_state_KBI = causal_conv_step(cache.conv_state_KBI, x_BI, self.conv.weight, self.conv.bias)
        dt_BI, B_BN, C_BN = self._selected(x_BI)
        y_BI, cache.ssm_state_BIN = selective_scan_step(
            cache.ssm_state_BIN,
            x_BI,
            dt_BI,
            self._decay(),
            B_BN,
            C_BN,
            self.D,
            z_BI=z_BI,
            dt_bias_I=self.dt_bias,
            dt_softplus=True,
        )
        return y_BI

    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the input: raw step sizes [..., I], B and C [..., N]. Every rank works out the same features,
        B and C, from sums over the channels of all.
        """
        selected = self._parallel.sum_inside(self.x_proj(x))
        features, B, C = selected.split([self.rank, self.state_dim, self.state_dim], dim=-1)
        return self.dt_proj(features), B, C

    def _decay(self) -> Tensor:
        """Continuous decays A < 0 [I, N], in fp32."""
        return -self.A_log.to(arithmetic_dtype(self.A_log.dtype)).exp()
