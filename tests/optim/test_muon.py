"""Muon on one process: torch's own Muon, the polar factor, and which parameters take it."""

from __future__ import annotations

import math

import pytest
import torch
from support.hybrid import hybrid
from torch import Tensor, nn

from pretrain.config.schema import MuonConfig, OptimizerConfig
from pretrain.optim.build import build_optimizer
from pretrain.optim.matrices import is_exempt, takes_muon
from pretrain.optim.muon import IS_MUON, MOMENTUM, orthogonalise
from pretrain.parallel.canonical import canonical_parameters
from pretrain.parallel.layers import (
    FusedLinear,
    TorchLayers,
    exempt_from_muon,
    exempt_from_weight_decay,
    stack_of_matrices,
)

# Rounding of the iteration in FP32, which amplifies small singular values about 500 times.
TOLERANCE = 2e-4


def torch_muon(parameters: list[nn.Parameter], config: MuonConfig) -> torch.optim.Muon:
    return torch.optim.Muon(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_in_bf16_every_bit_is_that_of_torch(shape: tuple[int, int]) -> None:
    config = MuonConfig(learning_rate=0.02, newton_schulz_precision="bf16")
    ours, theirs = nn.Linear(shape[1], shape[0], bias=False), nn.Parameter(torch.empty(shape))
    theirs.data.copy_(ours.weight.data)
    optimizer, reference = build_optimizer(ours, config), torch_muon([theirs], config)
    for gradient in gradients(shape, 4):
        ours.weight.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(ours.weight, theirs)
    assert torch.equal(optimizer.state[ours.weight][MOMENTUM], reference.state[theirs]["momentum_buffer"])


def exact_iteration(matrix: Tensor, steps: int) -> Tensor:
    """The iteration in float64 on the singular values: U p(p(...(S / |S|))) V^T, as its odd polynomials act there."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vh


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8), (1, 6)])
@pytest.mark.parametrize("steps", [1, 5])
def test_in_fp32_it_is_the_polynomial_of_the_singular_values(shape: tuple[int, int], steps: int) -> None:
    (matrix,) = gradients(shape, 1)
    found = orthogonalise(matrix, steps)
    assert (found.double() - exact_iteration(matrix, steps)).abs().max() < TOLERANCE


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(3, 4), 5), torch.zeros(3, 4))


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = stack_of_matrices(nn.Parameter(torch.randn(3, 4, 6)))


def test_packed_projections_and_experts_are_orthogonalised_one_by_one() -> None:
    config = MuonConfig(learning_rate=0.02, newton_schulz_precision="bf16")
    torch.manual_seed(0)
    packed, stack = FusedLinear(6, {"q": 8, "k": 4, "v": 4}), Stacked()
    pieces = [nn.Parameter(part.detach().clone()) for part in (*packed.weight.split([8, 4, 4]), *stack.experts)]
    model = nn.ModuleList([packed, stack])
    optimizer, reference = build_optimizer(model, config), torch_muon(pieces, config)
    for gradient, more in zip(gradients((16, 6), 3), gradients((3, 4, 6), 3), strict=True):
        packed.weight.grad, stack.experts.grad = gradient.clone(), more.clone()
        for piece, part in zip(pieces, (*gradient.split([8, 4, 4]), *more), strict=True):
            piece.grad = part.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(packed.weight, torch.cat(pieces[:3]))
    assert torch.equal(stack.experts, torch.stack(pieces[3:]))


def test_an_update_has_the_size_of_one_of_adamw() -> None:
    layer = nn.Linear(96, 192, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, MuonConfig(learning_rate=1e-2, weight_decay=0.0))
    (layer.weight.grad,) = gradients((192, 96), 1)
    optimizer.step()
    # 0.2 x the singular values that the iteration leaves, 0.7 to 1.2.
    change = (layer.weight.detach() - before).square().mean().sqrt()
    assert float(change) == pytest.approx(0.2e-2, rel=0.25)


def test_all_else_steps_as_in_adamw() -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.ModuleList([nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4)])

    ours, theirs = model(), model()
    optimizer = build_optimizer(ours, MuonConfig(learning_rate=0.02))
    reference = build_optimizer(theirs, OptimizerConfig(learning_rate=0.02))
    for step in range(3):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.full_like(mine, 0.1 + step)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    names = dict(ours.named_parameters())
    differing = [n for n, p in theirs.named_parameters() if not torch.equal(p, names[n])]
    assert differing == ["1.weight"]
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


def test_a_matrix_without_gradient_only_decays() -> None:
    layer = nn.Linear(3, 4, bias=False)
    before = layer.weight.detach().clone()
    build_optimizer(layer, MuonConfig(learning_rate=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.05), rtol=1e-6, atol=0.0)


def test_the_whole_family_is_sorted_into_groups() -> None:
    config = hybrid(
        "MmE*-",
        32,
        64,
        attention__num_heads=4,
        attention__num_kv_heads=4,
        attention__qk_norm=True,
        attention__qkv_bias=True,
        mamba2__head_dim=16,
        norm__kind="layer",
        tied_embeddings=False,
    )
    model = config.build(TorchLayers())
    parameters = {p.module_name: p.tensor for p in canonical_parameters(model)}

    def leaves(names: set[str]) -> set[str]:
        return {name.partition(".mixer.")[2] or name for name in names}

    taken = {name for name, tensor in parameters.items() if takes_muon(tensor)}
    projections = {"in_proj.weight", "out_proj.weight", "x_proj.weight", "dt_proj.weight", "qkv.weight"}
    assert leaves(taken) == projections | {"gate.weight", "up.weight", "down.weight"}
    decayed = {name for name, tensor in parameters.items() if not is_exempt(tensor)}
    # As in mamba_ssm, convolutions decay.
    assert leaves(decayed - taken) == {"embedding.weight", "head.weight", "conv.weight", "router.weight"}
    exempt = {name.rpartition(".")[2] for name in parameters.keys() - decayed - taken}
    assert exempt == {"A_log", "D", "dt_bias", "bias", "weight"}  # these weights are norms'
    assert all("norm" in name for name in parameters.keys() - decayed if name.endswith("weight"))
    kept = {name for name, tensor in parameters.items() if getattr(tensor, "keep_fp32", False)}
    assert leaves(kept) == {"A_log", "D", "dt_bias", "router.weight"}
    groups = build_optimizer(model, MuonConfig(weight_decay=0.3)).param_groups
    assert [(bool(group.get(IS_MUON)), group["weight_decay"]) for group in groups] == [
        (True, 0.3),
        (False, 0.3),
        (False, 0.0),
    ]


def test_marks_spare_matrices() -> None:
    matrix = nn.Parameter(torch.ones(3, 4))
    assert takes_muon(matrix)
    assert not takes_muon(nn.Parameter(torch.ones(3, 4, 5)))
    assert not takes_muon(exempt_from_muon(nn.Parameter(torch.ones(3, 4))))
    # Mamba-1's A_log [I, N].
    assert not takes_muon(exempt_from_weight_decay(nn.Parameter(torch.ones(3, 4))))


def test_the_iteration_brings_singular_values_near_one() -> None:
    (matrix,) = gradients((64, 128), 1)
    values = torch.linalg.svdvals(orthogonalise(matrix, 5))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    assert math.isfinite(float(values.sum()))
