"""Products of rows with their experts' matrices, against dense products with one-hot routing."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from pretrain.ops import grouped_matmul
from pretrain.ops.grouped_matmul import dispatch, expert_in, expert_out, weighted_activation

ROWS, TOP_K, EXPERTS, WIDTH, HIDDEN = 13, 2, 5, 8, 16


def routing() -> torch.Tensor:
    """Expert 3 gets no row, expert 1 most."""
    experts = torch.tensor([0, 1, 2, 4])
    generator = torch.Generator().manual_seed(0)
    rows = [experts[torch.randperm(4, generator=generator)[:TOP_K]] for _ in range(ROWS - 4)]
    return torch.stack(rows + [torch.tensor([1, 2])] * 4)


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


def test_slots_are_sorted_by_expert_and_lead_back():
    experts = routing()
    plan = dispatch(experts, EXPERTS)
    sent = experts.flatten()[plan.order_S]
    assert sent.tolist() == sorted(sent.tolist())
    assert torch.equal(plan.ends_E.long(), torch.bincount(sent, minlength=EXPERTS).cumsum(0))
    assert torch.equal(plan.row_S[plan.slot_RK], torch.arange(ROWS).unsqueeze(1).expand(ROWS, TOP_K))
    assert torch.equal(sent[plan.slot_RK], experts)


EXACT, FP32, BF16 = (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)
# On the CPU torch runs its grouped product as a loop of its own; the call and the operands' layout are those of CUDA.
CASES = [(*EXACT, False), (*FP32, False), (*BF16, False), (*FP32, True), (*BF16, True)]


@pytest.mark.parametrize(("dtype", "tolerance", "grouped"), CASES)
def test_both_ways_equal_dense_products(monkeypatch, dtype, tolerance, grouped):
    monkeypatch.setattr(grouped_matmul, "uses_grouped_mm", lambda *operands: grouped)
    experts = routing()
    plan = dispatch(experts, EXPERTS)
    one_hot_RE = F.one_hot(experts, EXPERTS).sum(1).double()
    x, up = random(ROWS, WIDTH, seed=1, dtype=dtype), random(EXPERTS, HIDDEN, WIDTH, seed=2, dtype=dtype)
    down = random(EXPERTS, WIDTH, HIDDEN, seed=3, dtype=dtype)
    dy = random(ROWS, WIDTH, seed=4, dtype=dtype).detach()
    h = expert_in(x, up, plan)
    y = expert_out(h, down, plan)
    y.backward(dy)

    dense = [t.detach().double().requires_grad_() for t in (x, up, down)]
    h_ERF = torch.einsum("rd,efd->erf", dense[0], dense[1])
    expected = torch.einsum("erf,edf,re->rd", h_ERF, dense[2], one_hot_RE)
    expected.backward(dy.double())
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(h[plan.slot_RK[0, 0]].double(), h_ERF[experts[0, 0], 0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * scale)
    for found, wanted in zip((x, up, down), dense, strict=True):
        limit = tolerance * float(wanted.grad.abs().max())
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=tolerance, atol=limit)
    assert not up.grad[3].any()
    assert not down.grad[3].any()


def test_leftovers_in_the_groups_without_rows_do_not_become_gradients(monkeypatch):
    """Some of torch's kernels leave what was in memory there."""
    monkeypatch.setattr(grouped_matmul, "uses_grouped_mm", lambda *operands: True)
    real = F.grouped_mm

    def leaving(a, b, *, offs):
        y = real(a, b, offs=offs)
        if y.ndim == 3:
            y[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return y

    monkeypatch.setattr(grouped_matmul.F, "grouped_mm", leaving)
    up = random(EXPERTS, HIDDEN, WIDTH, seed=2, dtype=torch.float32)
    expert_in(random(ROWS, WIDTH, seed=1, dtype=torch.float32), up, dispatch(routing(), EXPERTS)).sum().backward()
    assert torch.isfinite(up.grad).all()
    assert not up.grad[3].any()


def test_the_grouped_product_is_for_aligned_bf16_on_cuda():
    assert not grouped_matmul.uses_grouped_mm(torch.ones(8, 8, dtype=torch.bfloat16))
    meta = torch.ones(8, 8, device="meta", dtype=torch.bfloat16)
    assert not grouped_matmul.uses_grouped_mm(meta)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("slots", [1, 9])
def test_weighted_activation_equals_autograd(monkeypatch, activation, slots):
    monkeypatch.setattr("pretrain.ops.blocks.BLOCK_NUMBERS", 3 * HIDDEN)  # several blocks of rows
    up, gate = (random(slots, HIDDEN, seed=s, dtype=torch.float64) for s in (1, 2))
    weight = random(slots, seed=3, dtype=torch.float64)
    inputs = [up, gate, weight] if activation == "swiglu" else [up, weight]
    if activation == "swiglu":
        expected = torch.sigmoid(gate) * gate * up
    else:
        expected = up.clamp(min=0) ** 2 if activation == "relu2" else F.gelu(up)
    expected = expected * weight.unsqueeze(1)
    found = weighted_activation(activation, up, gate if activation == "swiglu" else None, weight)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    dout = random(slots, HIDDEN, seed=4, dtype=torch.float64).detach()
    for one, other in zip(
        torch.autograd.grad(found, inputs, dout), torch.autograd.grad(expected, inputs, dout), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
