"""Layer builders and canonical names of packed parameters."""

import pytest
import torch
from torch import nn

from pretrain.parallel.layers import TorchLayers, canonical_slices


def test_fused_column_equals_separate_linears():
    torch.manual_seed(0)
    fused = TorchLayers().fused_column(6, {"q": 4, "k": 2, "v": 3}, bias=True)
    x = torch.randn(5, 6)
    q, k, v = fused(x).split([4, 2, 3], dim=-1)
    pieces = {piece.name: piece.tensor for piece in canonical_slices(fused)}
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


def test_canonical_slices_cover_every_value_exactly_once():
    model = nn.Module()
    model.fused = TorchLayers().fused_column(3, {"a": 2, "b": 5}, bias=True)
    model.plain = nn.Linear(4, 4)
    model.scalar = nn.Parameter(torch.tensor(1.0))
    counts = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for piece in canonical_slices(model):
        count = counts[piece.parameter_name]
        (count if piece.component is None else count.narrow(0, piece.start, piece.rows)).add_(1)
    assert all(bool((count == 1).all()) for count in counts.values())


def test_canonical_names_insert_the_component_before_the_local_name():
    outer = nn.Module()
    outer.mixer = nn.Module()
    outer.mixer.in_proj = TorchLayers().fused_column(3, {"z": 2, "x": 5})
    assert [piece.name for piece in canonical_slices(outer)] == [
        "mixer.in_proj.z.weight",
        "mixer.in_proj.x.weight",
    ]


def test_canonical_slice_is_a_view():
    fused = TorchLayers().fused_column(3, {"z": 2, "x": 5})
    with torch.no_grad():
        list(canonical_slices(fused))[1].tensor.fill_(7.0)
    assert bool((fused.weight[2:] == 7.0).all())
    assert not bool((fused.weight[:2] == 7.0).any())


def test_tied_parameter_is_listed_once():
    model = nn.Module()
    model.embedding = nn.Embedding(4, 2)
    model.head = nn.Linear(2, 4, bias=False)
    model.head.weight = model.embedding.weight
    assert [piece.name for piece in canonical_slices(model)] == ["embedding.weight"]


@pytest.mark.parametrize(
    ("components", "message"),
    [({"weight": {"a": 2, "b": 1}}, "sum to 3 rows, expected 4"), ({"wieght": {"a": 4}}, "names 'wieght'")],
)
def test_wrong_component_declarations_are_refused(components, message):
    layer = nn.Linear(2, 4)
    layer.canonical_components = components
    with pytest.raises(ValueError, match=message):
        list(canonical_slices(layer))
