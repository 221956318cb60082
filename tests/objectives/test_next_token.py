"""Next-token loss against torch's cross-entropy in float64."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from pretrain.objectives.config import NextTokenConfig


def make_batch(packed: bool):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 8)
    batch = {
        "tokens": torch.randint(0, 11, shape, generator=generator, dtype=torch.int32),
        "targets": torch.randint(0, 11, shape, generator=generator, dtype=torch.int32),
        "loss_mask": torch.ones(shape, dtype=torch.bool),
        "seq_idx": torch.zeros(shape, dtype=torch.int32),
        "position_ids": torch.arange(8, dtype=torch.int32).repeat(3, 1),
    }
    if packed:
        batch["seq_idx"][1, 5:] = 1
        batch["seq_idx"][2, 6:] = -1
        batch["loss_mask"][1, 4] = False
        batch["loss_mask"][2, 5:] = False
    return batch


class Table(torch.nn.Module):
    """Logits looked up by token; remembers what it was called with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.logits = torch.nn.Parameter(3 * torch.randn(11, 11))

    def forward(self, tokens_LB, seq_idx_LB, position_ids_LB):
        self.called_with = (tokens_LB, seq_idx_LB, position_ids_LB)
        return self.logits[tokens_LB]


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradient_match_float64_cross_entropy(packed):
    model, batch = Table(), make_batch(packed)
    objective = NextTokenConfig().build()
    out = objective(model, batch)
    out.loss_sum.backward()

    exact = model.logits.detach().double().requires_grad_()
    mask = batch["loss_mask"]
    expected = F.cross_entropy(exact[batch["tokens"][mask].long()], batch["targets"][mask].long(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert out.metrics == {}


def test_loss_is_fp32_for_bf16_logits():
    model, batch = Table().bfloat16(), make_batch(True)
    loss = NextTokenConfig().build()(model, batch).loss_sum
    assert loss.dtype == torch.float32
    reference = NextTokenConfig().build()(model.float(), batch).loss_sum
    assert torch.equal(loss, reference)


def test_masked_targets_may_hold_anything():
    model, batch = Table(), make_batch(True)
    objective = NextTokenConfig(z_loss=0.1).build()
    before = objective(model, batch).loss_sum
    batch["targets"][~batch["loss_mask"]] = 999
    assert torch.equal(objective(model, batch).loss_sum, before)


def test_denominator_counts_targets_of_tensors_and_arrays():
    objective, batch = NextTokenConfig().build(), make_batch(True)
    assert objective.denominator(batch) == 3 * 8 - 4
    assert objective.denominator({"loss_mask": batch["loss_mask"].numpy()}) == 3 * 8 - 4


@pytest.mark.parametrize("packed", [False, True])
def test_model_gets_sequence_first_ids_and_none_only_for_single_documents(packed):
    model, batch = Table(), make_batch(packed)
    NextTokenConfig().build()(model, batch)
    tokens, segments, positions = model.called_with
    assert torch.equal(tokens, batch["tokens"].t())
    assert tokens.dtype == torch.int64
    assert torch.equal(positions, batch["position_ids"].t())
    if packed:
        assert torch.equal(segments, batch["seq_idx"].t())
    else:
        assert segments is None


def test_z_loss_is_added_in_training_and_left_out_of_evaluation():
    model, batch = Table(), make_batch(True)
    plain, regularised = NextTokenConfig().build(), NextTokenConfig(z_loss=0.01).build()
    cross_entropy = plain(model, batch).loss_sum
    out = regularised(model, batch)
    log_normaliser = model.logits.double().logsumexp(-1)[batch["tokens"].long()]
    expected = 0.01 * (log_normaliser**2)[batch["loss_mask"]].sum()
    torch.testing.assert_close((out.loss_sum - cross_entropy).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.metrics["z_loss"].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.metrics["cross_entropy"], cross_entropy.detach())
    with torch.no_grad():
        assert torch.equal(regularised(model, batch).loss_sum, cross_entropy)


def test_negative_z_loss_is_reported():
    assert [v[0] for v in NextTokenConfig(z_loss=-1.0).violations()] == ["z_loss"]
    assert list(NextTokenConfig().violations()) == []
