"""Where logical matrices lie in what a tensor-parallel rank stores of packed projections and experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.optim.matrices import matrices
from pretrain.parallel.canonical import Split, canonical_parameters, mark_split
from pretrain.parallel.layers import FusedLinear, stack_of_matrices


class Stack(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = stack_of_matrices(nn.Parameter(values.clone()))


def put_together(ranks: list[nn.Module]) -> dict[str, Tensor]:
    """Every logical matrix, from what all ranks store of it."""
    found: dict[str, Tensor] = {}
    for rank in ranks:
        (parameter,) = canonical_parameters(rank)
        for matrix in matrices(parameter):
            whole = found.setdefault(matrix.name, torch.full(matrix.shape, torch.nan))
            shard = matrix.shard
            stored = parameter.tensor.detach().view(-1)[matrix.start : matrix.start + shard.numel]
            place = whole.view(shard.num_rows, shard.row_length)[:, shard.start : shard.stop]
            assert place.isnan().all(), "stored twice"
            place.copy_(stored.view(place.shape))
    return found


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_experts_are_matrices_of_their_own_however_they_are_split(dim: int) -> None:
    values = torch.arange(4 * 6 * 10.0).view(4, 6, 10)
    ranks: list[nn.Module] = []
    for number, share in enumerate(values.chunk(2, dim)):
        rank = Stack(share)
        mark_split(rank.weight, Split(dim, number, 2))
        ranks.append(rank)
    found = put_together(ranks)
    assert list(found) == [f"weight[{expert}]" for expert in range(4)]
    assert torch.equal(torch.stack(list(found.values())), values)


def test_packed_projections_are_split_by_component() -> None:
    q, k = torch.arange(8 * 3.0).view(8, 3), torch.arange(4 * 3.0).view(4, 3)
    ranks: list[nn.Module] = []
    for number in range(2):
        rank = FusedLinear(3, {"q": 4, "k": 2})
        rank.weight.data.copy_(torch.cat([q.chunk(2)[number], k.chunk(2)[number]]))
        mark_split(rank.weight, Split(0, number, 2))  # type: ignore[arg-type]
        ranks.append(rank)
    found = put_together(ranks)
    assert torch.equal(found["q.weight"], q)
    assert torch.equal(found["k.weight"], k)
