"""Mamba-2 mixer (Dao & Gu, arXiv 2405.21060).

Shapes: L = sequence length, B = batch, D = model width, H = heads, P = head dim, G = groups, N = state size,
K = conv kernel width, I = inner width (H * P), C = convolved channels (I + 2 * G * N). Heads and groups are split over
tensor-parallel ranks: inside a mixer H, G, I and C count what this rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pretrain.nn.initialisation import (
    Initialiser,
    constant,
    inverse_softplus_step,
    log_uniform_decay,
    normal,
)
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mamba2_config import Mamba2Config
from pretrain.nn.norm import RMSNormGated
from pretrain.nn.short_conv import ShortConv
from pretrain.ops import backends
from pretrain.ops.blocks import arithmetic_dtype
from pretrain.ops.conv import causal_conv_final_state, causal_conv_step
from pretrain.ops.ssd import ssd_step
from pretrain.parallel.layers import ParallelLayers, exempt_from_weight_decay, keep_fp32


@dataclass
class Mamba2Cache:
    """Constant-size generation state: the last K - 1 convolution inputs, and the SSM state (fp32)."""

    conv_state_KBC: Tensor
    ssm_state_BHPN: Tensor


class Mamba2Mixer(nn.Module):
    """Selective state-space mixer: x_LBD -> y_LBD.

    One projection gives gate z, input x, B, C and step dt; a causal convolution with SiLU runs jointly over
    x, B and C; the SSD recurrence h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, y_t = C_t h_t + D x_t follows,
    then a gated RMSNorm over groups (gate first) and the output projection. State and convolution restart at
    document boundaries.

    Args:
        width: D.
        config: sizes of the whole model.
        norm_eps: of the gated RMSNorm.
    """

    def __init__(self, layers: ParallelLayers, width: int, config: Mamba2Config, norm_eps: float) -> None:
        super().__init__()
        inner, num_heads, num_groups = config.inner(width), config.heads(width), config.groups
        self.inner = layers.local(inner)
        self.num_heads = layers.local(num_heads)
        self.head_dim = config.head_dim
        self.state_dim = state_dim = config.state_dim
        self.num_groups = layers.local(num_groups)
        self.conv_kernel = config.conv_kernel
        self.chunk_size = config.chunk_size
        convolved = {"x": inner, "B": num_groups * state_dim, "C": num_groups * state_dim}
        self.dt_limit = config.dt_limit
        self.in_proj = layers.fused_column(width, {"z": inner, **convolved, "dt": num_heads}, bias=config.proj_bias)
        self.conv = ShortConv(layers, convolved, config.conv_kernel, config.conv_bias)
        self.A_log, self.D, self.dt_bias = (
            layers.own(keep_fp32(exempt_from_weight_decay(nn.Parameter(torch.empty(self.num_heads))))) for _ in range(3)
        )
        self.norm = RMSNormGated(layers, inner, config.normed_groups, norm_eps)
        self.out_proj = layers.row(inner, width, bias=config.proj_bias)

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """Normal projections, A in (-16, -1], D = 1, step sizes log-uniform in [0.001, 0.1), convolution as
        ``torch.nn.Conv1d``."""
        initialisers = {
            "in_proj.weight": normal(std),
            **{f"conv.{name}": fill for name, fill in self.conv.initialisers().items()},
            "A_log": log_uniform_decay(1.0, 16.0),
            "D": constant(1.0),
            "dt_bias": inverse_softplus_step(1e-3, 0.1, floor=1e-4),
            "norm.weight": constant(1.0),
            "out_proj.weight": normal(out_std),
        }
        if self.in_proj.bias is not None:
            initialisers |= {"in_proj.bias": constant(0.0), "out_proj.bias": constant(0.0)}
        return initialisers

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Mamba2Cache:
        """Zero state."""
        channels = self.inner + 2 * self.num_groups * self.state_dim
        conv_shape = (self.conv_kernel - 1, batch_size, channels)
        ssm_shape = (batch_size, self.num_heads, self.head_dim, self.state_dim)
        return Mamba2Cache(
            torch.zeros(conv_shape, dtype=dtype, device=device),
            torch.zeros(ssm_shape, dtype=arithmetic_dtype(dtype), device=device),
        )

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: Mamba2Cache | None = None) -> Tensor:
        """Mix.

        With a cache, continue from it and update it: either a whole prompt into an empty cache, or one
            position at a time.
        """
        channels = self.inner + 2 * self.num_groups * self.state_dim
        z_LBI, xBC_LBC, dt_LBH = self.in_proj(x_LBD).split([self.inner, channels, self.num_heads], dim=-1)
        work = arithmetic_dtype(x_LBD.dtype)
        dt_LBH = F.softplus(dt_LBH.to(work) + self.dt_bias.to(work))
        if self.dt_limit is not None:
            dt_LBH = dt_LBH.clamp(*self.dt_limit)
        if cache is None:
            y_LBI = self._scan(xBC_LBC, dt_LBH, layout)
        elif len(x_LBD) == 1:
            y_LBI = self._step(xBC_LBC[0], dt_LBH[0], cache).unsqueeze(0)
        else:
            y_LBI = self._scan(xBC_LBC, dt_LBH, layout, cache)
        return self.out_proj(self.norm(y_LBI, z_LBI))

    def _scan(
        self, xBC_LBC: Tensor, dt_LBH: Tensor, layout: SequenceLayout, cache: Mamba2Cache | None = None
    ) -> Tensor:
        """Whole sequences; with an empty cache, leave the final state in it."""
        segments = layout.seq_idx_LB
        if cache is not None:
            cache.conv_state_KBC = causal_conv_final_state(xBC_LBC, self.conv_kernel)
        xBC_LBC = backends.causal_conv(xBC_LBC, self.conv.weight, self.conv.bias, seq_idx_LB=segments)
        x, B, C = self._heads(xBC_LBC)
        y_LBHP, state_BHPN = backends.ssd(
            x,
            dt_LBH,
            self._decay(),
            B,
            C,
            self.D,
            seq_idx_LB=segments,
            chunk_size=self.chunk_size,
            need_state=cache is not None,
        )
        if cache is not None:
            assert state_BHPN is not None
            cache.ssm_state_BHPN = state_BHPN
        return y_LBHP.flatten(2)

    def _step(self, xBC_BC: Tensor, dt_BH: Tensor, cache: Mamba2Cache) -> Tensor:
        """One position: [B, C] -> y [B, I]."""
        xBC_BC, cache.conv_state_KBC = causal_conv_step(cache.conv_state_KBC, xBC_BC, self.conv.weight, self.conv.bias)
        x, B, C = self._heads(xBC_BC)
        y_BHP, cache.ssm_state_BHPN = ssd_step(cache.ssm_state_BHPN, x, dt_BH, self._decay(), B, C, self.D)
        return y_BHP.flatten(1)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split [..., C] into x [..., H, P] and B, C [..., G, N]."""
        grouped = self.num_groups * self.state_dim
        x, B, C = xBC.split([self.inner, grouped, grouped], dim=-1)
        shape = (self.num_groups, self.state_dim)
        return (
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            B.unflatten(-1, shape),
            C.unflatten(-1, shape),
        )

    def _decay(self) -> Tensor:
        """Continuous decay A < 0 per head, in fp32."""
        return -self.A_log.to(arithmetic_dtype(self.A_log.dtype)).exp()
