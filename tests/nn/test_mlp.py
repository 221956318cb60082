"""MLPs against transformers' activations with the same weights."""

import pytest
import torch
from support.cost_case import check_cost
from transformers.activations import ACT2FN

from pretrain.nn.cost import Cost
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


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize(("bias", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_cost_is_that_of_the_module(activation, bias, dtype):
    check_cost(MLPConfig(hidden_size=40, activation=activation, bias=bias), 32, dtype=dtype)
    check_cost(MLPConfig(ratio=1.5, activation=activation, bias=bias), 24, dtype=dtype)


@pytest.mark.parametrize(
    "error",
    [
        Cost(parameters=1),
        Cost(flops_per_token=2.0),
        Cost(activation_bytes_per_token=4.0),
        Cost(state_bytes=4.0),
    ],
)
def test_a_wrong_cost_is_noticed(error):
    class Wrong(MLPConfig):
        def cost(self, place, sequence_length, bytes_per_value=2):
            return super().cost(place, sequence_length, bytes_per_value) + error

    with pytest.raises(AssertionError, match="stated"):
        check_cost(Wrong(hidden_size=40), 32)
