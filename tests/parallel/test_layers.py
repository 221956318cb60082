"""Layer builders and canonical names of packed parameters."""

import pytest
import torch
from support.logical import logical_tensors
from torch import nn

from pretrain.parallel.canonical import canonical_parameters
from pretrain.parallel.layers import TorchLayers


def test_fused_column_equals_separate_linears():
    torch.manual_seed(0)
    fused = TorchLayers().fused_column(6, {"q": 4, "k": 2, "v": 3}, bias=True)
    x = torch.randn(5, 6)
    q, k, v = fused(x).split([4, 2, 3], dim=-1)
    pieces = logical_tensors(fused)
    for name, y in (("q", q), ("k", k), ("v", v)):
        torch.testing.assert_close(nn.functional.linear(x, pieces[f"{name}.weight"], pieces[f"{name}.bias"]), y)


def test_column_and_row_shapes_and_bias_decay_exemption():
    layers = TorchLayers()
    column, row = layers.column(3, 5, bias=True), layers.row(5, 3, bias=False)
    assert row(column(torch.zeros(2, 7, 3))).shape == (2, 7, 3)
    assert column.bias.no_weight_decay
    assert not hasattr(column.weight, "no_weight_decay")
    assert row.bias is None
    assert layers.embedding(11, 3)(torch.tensor([[10]])).shape == (1, 1, 3)


def test_logical_tensors_are_views_that_cover_every_value_exactly_once():
    model = nn.Module()
    model.fused = TorchLayers().fused_column(3, {"a": 2, "b": 5}, bias=True)
    model.plain = nn.Linear(4, 4)
    model.scalar = nn.Parameter(torch.tensor(1.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for tensor in logical_tensors(model).values():
            tensor.add_(1)
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())


def test_canonical_names_insert_the_component_before_the_local_name():
    outer = nn.Module()
    outer.mixer = nn.Module()
    outer.mixer.in_proj = TorchLayers().fused_column(3, {"z": 2, "x": 5})
    assert list(logical_tensors(outer)) == ["mixer.in_proj.z.weight", "mixer.in_proj.x.weight"]


def test_tied_parameter_is_listed_once():
    model = nn.Module()
    model.embedding = nn.Embedding(4, 2)
    model.head = nn.Linear(2, 4, bias=False)
    model.head.weight = model.embedding.weight
    assert list(logical_tensors(model)) == ["embedding.weight"]


@pytest.mark.parametrize(
    ("components", "message"),
    [({"weight": {"a": 2, "b": 1}}, "sum to 3 rows, expected 4"), ({"wieght": {"a": 4}}, "names 'wieght'")],
)
def test_wrong_component_declarations_are_refused(components, message):
    layer = nn.Linear(2, 4)
    layer.canonical_components = components
    with pytest.raises(ValueError, match=message):
        list(canonical_parameters(layer))
