"""Position-wise MLPs: SwiGLU (Shazeer, arXiv 2002.05202), GELU, squared ReLU (So et al., arXiv 2109.08668).

Shapes: L = sequence length, B = batch, D = model width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pretrain.nn.initialisation import Initialiser, constant, normal
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mlp_config import MLPConfig
from pretrain.parallel.layers import ParallelLayers


class MLP(nn.Module):
    """Two linear layers around an activation: x_LBD -> y_LBD. ``swiglu`` gates a third, fused with the first.

    Args:
        width: D.
        config: sizes of the whole model.
    """

    def __init__(self, layers: ParallelLayers, width: int, config: MLPConfig) -> None:
        super().__init__()
        hidden_size = config.hidden(width)
        self.activation = config.activation
        if self.activation == "swiglu":
            self.in_proj = layers.fused_column(width, {"gate": hidden_size, "up": hidden_size}, bias=config.bias)
        else:
            self.in_proj = layers.column(width, hidden_size, bias=config.bias)
        self.out_proj = layers.row(hidden_size, width, bias=config.bias)

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """Normal weights, ``out_std`` for the projection that writes to the residual stream; no bias at first."""
        weights = {"in_proj.weight": normal(std), "out_proj.weight": normal(out_std)}
        if self.in_proj.bias is not None:
            weights |= {"in_proj.bias": constant(0.0), "out_proj.bias": constant(0.0)}
        return weights

    def init_cache(self, *_: object) -> None:
        """An MLP remembers nothing."""
        return

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: None = None) -> Tensor:
        """Apply to every position alone; ``layout`` and ``cache`` are the common mixer arguments, unused."""
        hidden = self.in_proj(x_LBD)
        if self.activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        else:
            hidden = F.relu(hidden).square()
        return self.out_proj(hidden)
