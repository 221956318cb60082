"""MLPs against transformers' activations with the same weights."""

import pytest
import torch
from transformers.activations import ACT2FN

from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mlp import MLP
from pretrain.nn.mlp_config import MLPConfig
from pretrain.parallel.layers import TorchLayers


@pytest.mark.parametrize(("activation", "theirs"), [("swiglu", "silu"), ("gelu", "gelu"), ("relu2", "relu2")])
def test_mlp_matches_written_out_layers(activation, theirs):
    torch.manual_seed(0)
    mlp = MLP(TorchLayers(), 6, MLPConfig(hidden_size=10, activation=activation))
    x = torch.randn(5, 2, 6)
    weight = mlp.in_proj.weight
    if activation == "swiglu":
        hidden = ACT2FN[theirs](x @ weight[:10].t()) * (x @ weight[10:].t())
    else:
        hidden = ACT2FN[theirs](x @ weight.t())
    y = mlp(x, SequenceLayout(5, 2, x.device))
    torch.testing.assert_close(y, hidden @ mlp.out_proj.weight.t())
