"""Megatron's layers against torch's with the same logical weights, and the marks on their parameters."""

import pytest
import torch
from support.tensor_parallel import copy_shares, megatron_layers, parts_of, share, sum_replicated_gradients
from torch import nn

from pretrain.parallel.canonical import canonical_buffers, canonical_parameters
from pretrain.parallel.layers import TorchLayers

COMPONENTS = {"value": 8, "gate": 8, "rest": 4}
LENGTH, BATCH, WIDTH, VOCABULARY = 10, 3, 6, 16


class Layers(nn.Module):
    """One of each layer, with biases, joined as a model joins them."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers
        self.embedding = layers.embedding(VOCABULARY, WIDTH)
        self.in_proj = layers.fused_column(WIDTH, COMPONENTS, bias=True)
        self.out_proj = layers.row(8, WIDTH, bias=True)
        self.column = layers.column(WIDTH, 4, bias=True)
        self.head = layers.head(WIDTH, VOCABULARY)

    def forward(self, tokens_LB):
        """Outputs split over their last dimension."""
        x_LBD = self.embedding(tokens_LB)
        sizes = [self.layers.local(n) for n in COMPONENTS.values()]
        value, gate, rest = self.in_proj(x_LBD).split(sizes, dim=-1)
        x_LBD = x_LBD + self.out_proj(value * gate.sigmoid())
        logits = self.layers.tied_logits(x_LBD, self.embedding.weight)
        return rest, self.column(x_LBD), self.head(x_LBD), logits


def compare(rank, size, sequence_parallel, frozen):
    torch.manual_seed(0)
    whole = Layers(TorchLayers()).double()
    local = Layers(megatron_layers(size, sequence_parallel))
    copy_shares(whole, local, rank, size)
    assert [name for name, _ in local.named_parameters()] == [name for name, _ in whole.named_parameters()]
    for model in (whole, local):
        for parameter in model.embedding.parameters():
            parameter.requires_grad_(not frozen)
    tokens = torch.randint(0, VOCABULARY, (LENGTH, BATCH), generator=torch.Generator().manual_seed(1))
    expected, outputs = whole(tokens), local(tokens)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in expected]
    shares = [weight.chunk(size, -1)[rank] for weight in weights]
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted.chunk(size, -1)[rank], rtol=1e-12, atol=1e-12)
    sum((output * weight).sum() for output, weight in zip(expected, weights, strict=True)).backward()
    sum((output * weight).sum() for output, weight in zip(outputs, shares, strict=True)).backward()
    sum_replicated_gradients(local, sequence_parallel)
    if frozen:
        assert local.embedding.weight.grad is None
        del whole.embedding, local.embedding
    gradients = parts_of(whole, gradients=True)
    for name, (part, gradient) in parts_of(local, gradients=True).items():
        wanted = share(part, gradients[name][1], rank, size)
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: name + text)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_layer_equals_torch_in_outputs_and_gradients(worker_pools, sequence_parallel, frozen):
    worker_pools(2, "megatron").run(compare, sequence_parallel, frozen)


def marks(rank, size):
    model = Layers(megatron_layers(size, sequence_parallel=True))
    names = {p.module_name: p for p in canonical_parameters(model)}
    assert list(names) == [name for name, _ in model.named_parameters()]
    found = {}
    for name, parameter in names.items():
        tensor = parameter.tensor
        dims = {d for p in parameter.parts for d in range(len(p.shape)) if p.shape[d] != p.local_shape[d]}
        split = getattr(tensor, "tensor_model_parallel", False)
        assert dims == ({tensor.partition_dim} if split else set()), name
        summed = getattr(tensor, "sequence_parallel", False)
        found[name] = "sum" if summed else tensor.partition_dim
    vocabulary = model.layers.vocabulary(VOCABULARY)
    exempt = [name for name, p in names.items() if getattr(p.tensor, "no_weight_decay", False)]
    part_names = [p.name for p in names["in_proj.weight"].parts]
    return found, exempt, part_names, list(canonical_buffers(model)), (vocabulary.start, vocabulary.stop)


@pytest.mark.distributed
def test_parameters_carry_the_marks_of_checkpoints_and_of_megatron(worker_pools):
    results = worker_pools(2, "megatron").run(marks)
    for found, exempt, parts, buffers, _ in results:
        assert found == {
            "embedding.weight": 0,
            "in_proj.weight": 0,
            "in_proj.bias": 0,
            "out_proj.weight": 1,
            "out_proj.bias": "sum",
            "column.weight": 0,
            "column.bias": 0,
            "head.weight": 0,
        }
        assert exempt == ["in_proj.bias", "out_proj.bias", "column.bias"]
        assert parts == [f"in_proj.{name}.weight" for name in COMPONENTS]
        assert buffers == []
    assert [result[-1] for result in results] == [(0, 8), (8, 16)]


def uneven(rank, size):
    layers = megatron_layers(size)
    with pytest.raises(AssertionError, match="7 does not split over 2"):
        layers.fused_column(4, {"a": 8, "b": 7, "c": 9})  # 24 rows in all would split


@pytest.mark.distributed
def test_components_must_split_each_by_itself(worker_pools):
    worker_pools(2, "megatron").run(uneven)
