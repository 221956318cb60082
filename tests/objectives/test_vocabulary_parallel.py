"""Cross-entropy over a split vocabulary against torch in float64 on the whole logits."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F  # noqa: N812

from pretrain.objectives.cross_entropy import cross_entropy_rows
from pretrain.ops import blocks
from pretrain.parallel.vocabulary import VocabularyShard

ROWS, VOCABULARY = 37, 24


def logits_and_targets(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)).to(dtype)
    logits[0, 3] = 3e4  # overflows unless the maximum is that of the whole row
    return logits, torch.randint(0, VOCABULARY, (ROWS,), generator=generator)


def objective(loss_R, log_z_R):
    weights = torch.linspace(-1, 2, ROWS, dtype=loss_R.dtype)
    return (weights * loss_R).sum() + 0.3 * (log_z_R / 10).square().sum()


def shard(rank, size):
    width = VOCABULARY // size
    return VocabularyShard(rank * width, (rank + 1) * width, dist.group.WORLD)


def losses_and_gradient(rank, size, dtype):
    logits, targets = logits_and_targets(dtype)
    vocabulary = shard(rank, size)
    local = logits[:, vocabulary.start : vocabulary.stop].clone().requires_grad_()
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    # Small blocks, so that several of them make up the rows.
    with mock.patch.object(blocks, "BLOCK_NUMBERS", 60):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_R, log_z_R = cross_entropy_rows(local, targets, vocabulary)
        with mock.patch.object(dist, "all_reduce", side_effect=AssertionError("communication in backward")):
            objective(loss_R, log_z_R).backward()
    others = [tensor.numel() for tensor in saved if tensor.data_ptr() != local.data_ptr()]
    assert max(others) <= ROWS, "a second copy of the logits is kept"
    return loss_R.detach(), log_z_R.detach(), local.grad


def expected(dtype):
    logits, targets = logits_and_targets(dtype)
    exact = logits.double().requires_grad_()
    loss_R, log_z_R = F.cross_entropy(exact, targets, reduction="none"), exact.logsumexp(-1)
    objective(loss_R, log_z_R).backward()
    return loss_R.detach(), log_z_R.detach(), exact.grad


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_split_over_two_ranks_equals_torch(worker_pools, dtype, tolerance):
    results = worker_pools(2).run(losses_and_gradient, dtype)
    loss_R, log_z_R, gradient_RV = expected(dtype)
    for loss, log_z, _ in results:
        torch.testing.assert_close(loss.double(), loss_R, rtol=min(tolerance, 1e-5), atol=min(tolerance, 1e-5))
        torch.testing.assert_close(log_z.double(), log_z_R, rtol=min(tolerance, 1e-5), atol=min(tolerance, 1e-5))
        assert torch.equal(loss, results[0][0])  # every rank reports the same loss
    gradient = torch.cat([part for _, _, part in results], dim=1)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), gradient_RV, rtol=tolerance, atol=tolerance)


def targets_on_one_rank(rank, size):
    """All targets of a rank's own part: the other rank contributes to the normaliser only."""
    vocabulary = shard(rank, size)
    logits = torch.zeros(2, VOCABULARY // size, requires_grad=True)
    loss_R, log_z_R = cross_entropy_rows(logits, torch.tensor([0, VOCABULARY - 1]), vocabulary)
    loss_R.sum().backward()
    return loss_R.tolist(), log_z_R.tolist(), logits.grad


@pytest.mark.distributed
def test_first_and_last_token_of_the_vocabulary(worker_pools):
    uniform = torch.full((2,), float(VOCABULARY)).log().tolist()
    results = worker_pools(2).run(targets_on_one_rank)
    gradient = torch.cat([part for _, _, part in results], dim=1)
    wanted = torch.full((2, VOCABULARY), 1 / VOCABULARY)
    wanted[0, 0] -= 1
    wanted[1, -1] -= 1
    for loss, log_z, _ in results:
        assert loss == pytest.approx(uniform, rel=1e-6)
        assert log_z == pytest.approx(uniform, rel=1e-6)
    torch.testing.assert_close(gradient, wanted)
