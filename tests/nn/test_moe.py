"""The mixture of experts against plain loops in float64, transformers' classes, and finite differences."""

import dataclasses

import pytest
import torch
from support.cost_case import build, check_cost
from support.hybrid import hybrid
from torch.nn import functional as F  # noqa: N812
from transformers import MixtralConfig, NemotronHConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from pretrain.nn.auxiliary import AuxiliaryLosses
from pretrain.nn.initialisation import initialise
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mixer_config import Place
from pretrain.nn.moe import MoE
from pretrain.nn.moe_config import MoEConfig
from pretrain.parallel.layers import TorchLayers

WIDTH, LENGTH, BATCH = 8, 7, 3
CONFIG = MoEConfig(num_experts=6, top_k=2, hidden_size=10, balance_loss=0.3, z_loss=0.2)
VARIANTS = [
    {},
    {"router": "sigmoid", "routed_scale": 2.5, "shared_hidden_size": 12, "top_k": 3},
    {"router": "sigmoid", "normalise_top_k": False, "activation": "relu2", "top_k": 1},
    {"activation": "gelu", "normalise_top_k": False, "shared_hidden_size": 6, "num_experts": 3, "top_k": 3},
]
SEGMENTS = torch.tensor([[0, 0, 1, 1, 2, -1, -1], [0] * 7, [0, 1, 1, 1, 1, 1, -1]]).t()


def moe(config: MoEConfig, dtype: torch.dtype = torch.float32, std: float = 0.4) -> MoE:
    module = MoE(TorchLayers(), WIDTH, config)
    initialise(module, module.initialisers(std, std), seed=1)
    return module.to(dtype)


def hidden(dtype: torch.dtype = torch.float32, length: int = LENGTH, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(length, batch, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def layout(segments: torch.Tensor | None = None, length: int = LENGTH, batch: int = BATCH) -> SequenceLayout:
    return SequenceLayout(length, batch, torch.device("cpu"), segments)


def activate(name: str, up: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    if gate is not None:
        return gate * torch.sigmoid(gate) * up
    return F.gelu(up) if name == "gelu" else up.clamp(min=0) ** 2


def written_out(module: MoE, x: torch.Tensor, segments: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weighted auxiliary losses (sums over tokens), token by token and expert by expert."""
    config = module.config
    rows, losses = [], []
    for b in range(x.shape[1]):
        outputs, chosen, shares = [], [], []
        real = [t for t in range(len(x)) if segments is None or segments[t, b] >= 0]
        for t in range(len(x)):
            token = x[t, b]
            logits = module.router.weight @ token
            scores = logits.exp() / logits.exp().sum() if config.router == "softmax" else 1 / (1 + (-logits).exp())
            best = sorted(range(config.num_experts), key=lambda e, s=scores: -s[e].item())[: config.top_k]
            total = sum(scores[e] for e in best) if config.normalise_top_k else 1.0
            y = torch.zeros_like(token)
            for e in best:
                gate = None if module.gate is None else module.gate.weight[e] @ token
                inner = activate(config.activation, module.up.weight[e] @ token, gate)
                y = y + config.routed_scale * scores[e] / total * (module.down.weight[e] @ inner)
            if module.shared is not None:
                parts = (module.shared.in_proj.weight @ token).chunk(2 if module.gate is not None else 1)
                inner = activate(config.activation, parts[-1], parts[0] if module.gate is not None else None)
                y = y + module.shared.out_proj.weight @ inner
            outputs.append(y)
            if t in real:
                chosen.append(best)
                shares.append(scores / scores.sum())
                losses.append(config.z_loss * logits.exp().sum().log() ** 2)
        for e in range(config.num_experts):
            f = config.num_experts / (config.top_k * len(real)) * sum(e in best for best in chosen)
            p = sum(share[e] for share in shares) / len(real)
            losses.append(config.balance_loss * len(real) * f * p)
        rows.append(torch.stack(outputs))
    return torch.stack(rows, 1), torch.stack([torch.as_tensor(loss) for loss in losses]).sum()


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_loop_over_tokens_and_experts_in_float64_with_its_losses(variant, segments):
    module = moe(dataclasses.replace(CONFIG, **variant), torch.float64)
    x = hidden(torch.float64)
    dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected, losses = written_out(module, x, segments)
    wanted = torch.autograd.grad((expected * dy).sum() + 0.7 * losses, [x, *module.parameters()])
    channel = AuxiliaryLosses([module], lambda own: [own])
    channel.set_scale(0.7)
    y = module(x, layout(segments))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((y * dy).sum(), [x, *module.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_nothing_is_added_without_gradients_nor_before_an_engine_asks():
    module = moe(CONFIG, torch.float64)
    x = hidden(torch.float64)
    expected, _ = written_out(module, x, None)
    wanted = torch.autograd.grad(expected.sum(), list(module.parameters()))
    y = module(x, layout())
    for one, other in zip(torch.autograd.grad(y.sum(), list(module.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    channel = AuxiliaryLosses([module], lambda own: [own])
    assert any(channel.report().values)
    with torch.no_grad():
        assert not module(x, layout()).requires_grad
    assert not any(channel.report().values)


def test_numbers_are_reported_once_with_recomputation_and_over_micro_batches():
    module = moe(CONFIG, torch.float64)
    channel = AuxiliaryLosses([module], lambda own: [own])
    x = hidden(torch.float64)
    for b in range(BATCH):
        row = x[:, b : b + 1]
        torch.utils.checkpoint.checkpoint(
            module, row, layout(SEGMENTS[:, b : b + 1], batch=1), use_reentrant=False
        ).sum().backward()
    report = channel.report()
    *sent, balance, z, tokens = report.values
    assert sum(sent) == 2 * tokens == 2 * int((SEGMENTS >= 0).sum())
    ones = moe(dataclasses.replace(CONFIG, balance_loss=1.0, z_loss=0.0), torch.float64)
    assert balance == pytest.approx(written_out(ones, x, SEGMENTS)[1].item())
    ones = moe(dataclasses.replace(CONFIG, balance_loss=0.0, z_loss=1.0), torch.float64)
    assert z == pytest.approx(written_out(ones, x, SEGMENTS)[1].item())
    metrics = report.metrics(report.values)
    assert metrics["router_balance_loss"] == pytest.approx(balance / tokens)
    assert metrics["router_z_loss"] == pytest.approx(z / tokens)
    assert metrics["busiest_expert"] == pytest.approx(max(sent) / (sum(sent) / 6))


def test_an_even_load_costs_one_for_each_token():
    module = moe(MoEConfig(num_experts=4, top_k=1, hidden_size=4))
    with torch.no_grad():
        module.router.weight.copy_(torch.eye(4, WIDTH) * 20)
    x = torch.eye(WIDTH)[torch.arange(8) % 4].unsqueeze(1).requires_grad_()
    channel = AuxiliaryLosses([module], lambda own: [own])
    module(x, layout(None, 8, 1)).sum().backward()
    report = channel.report()
    metrics = report.metrics(report.values)
    assert metrics["router_balance_loss"] == pytest.approx(1.0)
    assert metrics["busiest_expert"] == 1.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_finite_differences(variant):
    module = moe(dataclasses.replace(CONFIG, **variant), torch.float64)
    names, values = zip(*module.named_parameters(), strict=True)

    def function(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (x, layout(None, 3, 2)))

    x = hidden(torch.float64, 3, 2)
    assert torch.autograd.gradcheck(function, (x, *values), eps=1e-6, atol=1e-7)


def test_experts_without_a_token_get_zero_gradients():
    module = moe(CONFIG)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[1] += 1.0
        module.router.weight[4] += 0.5
    x = torch.ones(LENGTH, BATCH, WIDTH, requires_grad=True)
    module(x, layout()).sum().backward()
    for part in (module.gate, module.up, module.down):
        used = part.weight.grad.abs().sum((1, 2)) > 0
        assert used.tolist() == [False, True, False, False, True, False]


def compare(module, theirs, x, tolerance=2e-6):
    """Outputs and gradients of both modules with the same weights; those of the inputs are compared here."""
    other = x.detach().clone().requires_grad_()
    y, expected = module(x, layout()), theirs(other.transpose(0, 1).contiguous()).transpose(0, 1)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, other.grad, rtol=10 * tolerance, atol=10 * tolerance)


def test_softmax_router_is_mixtrals():
    module = moe(CONFIG)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 10, "num_local_experts": 6, "num_experts_per_tok": 2}
    theirs = MixtralSparseMoeBlock(MixtralConfig(**sizes, experts_implementation="eager"))
    with torch.no_grad():
        theirs.gate.weight.copy_(module.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([module.gate.weight, module.up.weight], 1))
        theirs.experts.down_proj.copy_(module.down.weight)
    compare(module, theirs, hidden())
    gate, up = theirs.experts.gate_up_proj.grad.chunk(2, 1)
    pairs = [(gate, module.gate), (up, module.up), (theirs.experts.down_proj.grad, module.down)]
    for gradient, part in [*pairs, (theirs.gate.weight.grad, module.router)]:
        torch.testing.assert_close(part.weight.grad, gradient, rtol=2e-5, atol=2e-5)


def test_sigmoid_router_with_shared_expert_is_nemotron_hs():
    config = MoEConfig(
        num_experts=6,
        top_k=3,
        hidden_size=10,
        activation="relu2",
        shared_hidden_size=12,
        router="sigmoid",
        routed_scale=2.5,
    )
    module = moe(config)
    theirs = NemotronHMoE(
        NemotronHConfig(
            hidden_size=WIDTH,
            n_routed_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=10,
            moe_shared_expert_intermediate_size=12,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            mlp_hidden_act="relu2",
            n_group=1,
            topk_group=1,
            experts_implementation="eager",
        )
    )
    with torch.no_grad():
        theirs.gate.weight.copy_(module.router.weight)
        theirs.experts.up_proj.copy_(module.up.weight)
        theirs.experts.down_proj.copy_(module.down.weight)
        theirs.shared_experts.up_proj.weight.copy_(module.shared.in_proj.weight)
        theirs.shared_experts.down_proj.weight.copy_(module.shared.out_proj.weight)
    compare(module, theirs, hidden())
    pairs = [(theirs.experts.up_proj, module.up), (theirs.experts.down_proj, module.down)]
    for other, part in [*pairs, (theirs.gate.weight, module.router)]:
        torch.testing.assert_close(part.weight.grad, other.grad, rtol=2e-5, atol=5e-5)


def test_bf16_routes_as_fp32_does_and_stays_close():
    module = moe(CONFIG, torch.bfloat16)
    whole = moe(CONFIG, torch.bfloat16).float()
    x = hidden(torch.bfloat16)
    y = module(x, layout())
    assert y.dtype == torch.bfloat16
    assert torch.equal(module.router(x), whole.router(x.float()))
    torch.testing.assert_close(y.float(), whole(x.float(), layout()), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cost_is_that_of_the_module(variant, dtype):
    config = dataclasses.replace(CONFIG, **variant)
    cost = check_cost(config, WIDTH, dtype=dtype)
    assert cost.state_bytes == 0
    check_cost(dataclasses.replace(config, balance_loss=0.0, z_loss=0.0), WIDTH, dtype=dtype)


def test_idle_parameters_are_the_experts_that_a_token_is_not_sent_to():
    module = build(CONFIG, Place(width=WIDTH))
    cost = CONFIG.cost(Place(width=WIDTH), 16)
    x = hidden(length=1, batch=1)
    module(x, layout(None, 1, 1)).sum().backward()
    experts = [module.gate.weight, module.up.weight, module.down.weight]
    idle = sum(int((p.grad.abs().sum((1, 2)) == 0).sum()) * p[0].numel() for p in experts)
    assert cost.idle_parameters == idle > 0


def test_violations_name_fields_and_fixes():
    faulty = MoEConfig(num_experts=2, top_k=3, hidden_size=0, shared_hidden_size=-1, balance_loss=-0.1, z_loss=-1.0)
    found = {field: fix for field, _, _, fix in faulty.violations(8, 1)}
    assert found.keys() == {"top_k", "hidden_size", "shared_hidden_size", "balance_loss", "z_loss"}
    assert "2" in found["top_k"]
    assert {v[0] for v in MoEConfig(num_experts=0, top_k=0, ratio=0.0, routed_scale=0.0).violations(8, 1)} == {
        "num_experts",
        "top_k",
        "ratio",
        "routed_scale",
    }
    split = MoEConfig(hidden_size=10, shared_hidden_size=6)
    assert {v[0]: v[3] for v in split.parallel_violations(8, 4)} == {
        "hidden_size": "set hidden_size to 12, or fewer tensor-parallel ranks",
        "shared_hidden_size": "set shared_hidden_size to 8, or fewer tensor-parallel ranks",
    }
    assert not list(MoEConfig().violations(8, 1))


MODEL = hybrid(
    pattern="*EME",
    width=16,
    vocab_size=32,
    attention__num_heads=2,
    mamba2__head_dim=8,
    mamba2__state_dim=4,
    mamba2__chunk_size=8,
    moe__num_experts=4,
    moe__hidden_size=12,
    moe__shared_hidden_size=8,
    init_std=0.2,
)


def model():
    built = MODEL.build(TorchLayers())
    built.reset_parameters(0)
    return built.double()


def test_packed_documents_are_separate_documents():
    lengths = [5, 1, 8]
    tokens = torch.randint(32, (sum(lengths), 1), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[i] for i, n in enumerate(lengths) for _ in range(n)])
    positions = torch.tensor([[p] for n in lengths for p in range(n)])
    network = model()
    packed = network(tokens, ids, positions).split(lengths)
    for part, document in zip(packed, tokens.split(lengths), strict=True):
        torch.testing.assert_close(part, network(document), rtol=1e-11, atol=1e-11)


def test_prefill_and_decoding_are_the_whole_sequence():
    network = model()
    tokens = torch.randint(32, (9, 2), generator=torch.Generator().manual_seed(0))
    whole = network(tokens)
    cache = network.init_cache(2, torch.float64, "cpu")
    torch.testing.assert_close(network.prefill(tokens[:5], cache), whole[:5], rtol=1e-11, atol=1e-11)
    for t in range(5, 9):
        torch.testing.assert_close(network.decode(tokens[t], cache), whole[t], rtol=1e-11, atol=1e-11)
