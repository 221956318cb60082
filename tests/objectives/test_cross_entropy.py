"""Row-wise cross-entropy against torch in float64, with more rows than one block holds."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from pretrain.objectives.cross_entropy import cross_entropy_rows
from pretrain.ops.blocks import BLOCK_NUMBERS


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_loss_log_normaliser_and_gradient_over_several_blocks(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    vocab_size = 5000
    rows = 5 * BLOCK_NUMBERS // (2 * vocab_size)
    logits = (20 * torch.randn(rows, vocab_size, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab_size, (rows,), generator=generator)
    loss_weights, norm_weights = torch.randn(2, rows, generator=generator)
    loss_R, log_z_R = cross_entropy_rows(logits, targets)
    assert loss_R.dtype == log_z_R.dtype == torch.float32
    (loss_R @ loss_weights + log_z_R @ norm_weights).backward()

    exact = logits.detach().double().requires_grad_()
    expected_loss, expected_log_z = F.cross_entropy(exact, targets, reduction="none"), exact.logsumexp(-1)
    (expected_loss @ loss_weights.double() + expected_log_z @ norm_weights.double()).backward()
    torch.testing.assert_close(loss_R.double(), expected_loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(log_z_R.double(), expected_log_z, rtol=1e-5, atol=1e-4)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[3e4, 0.0], [-3e4, 0.0]], requires_grad=True)
    loss_R, _ = cross_entropy_rows(logits, torch.tensor([0, 0]))
    loss_R.sum().backward()
    torch.testing.assert_close(loss_R, torch.tensor([0.0, 3e4]))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))


def test_gradient_by_finite_differences():
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3])
    assert torch.autograd.gradcheck(lambda x: cross_entropy_rows(x, targets), (logits,))
