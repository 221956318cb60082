"""Engines with offloaded optimizer states against a loop that knows nothing of either: plain autograd over whole
parameters, and the specification of AdamW. Every bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engine_case import NUM_STEPS, Case, PackedNet, loss_function, rate, run_steps, samples
from support.offload_engine_case import OffloadCase, build, exported
from torch import Tensor

from pretrain.config.schema import OffloadConfig
from pretrain.optim.matrices import is_exempt, mark_embeddings
from pretrain.optim.offload.arithmetic import StepScalars, adamw_
from pretrain.parallel.canonical import canonical_parameters

pytestmark = pytest.mark.distributed

PLAN = OffloadConfig(enabled=True, subgroup_size=37, fraction=0.4, resident_fraction=0.2)


def specified(case: Case) -> dict[str, Tensor]:
    """Masters and moments after all steps, by slot and canonical name. Gradients of micro-batches are summed over ranks
    first, as from ZeRO-2 on."""
    model = PackedNet()
    mark_embeddings(model)
    trained = [p for p in canonical_parameters(model) if p.tensor.requires_grad]
    state = {p.module_name: [torch.zeros(p.tensor.numel()) for _ in range(2)] for p in trained}
    optimizer = case.config().optimizer
    for step in range(NUM_STEPS):
        batch = samples(step)
        sums = [torch.zeros_like(p.tensor) for p in trained]
        for turn in range(2):
            ranks = []
            for rank in range(case.size):
                start = case.micro_batch * (turn * case.size + rank)
                rows = {name: values[start : start + case.micro_batch] for name, values in batch.items()}
                scale = case.size / float(batch["mask"].sum())
                (loss_function(model, rows).loss_sum * scale).backward()
                ranks.append([p.tensor.grad for p in trained])
                model.zero_grad()
            for total, *gradients in zip(sums, *ranks, strict=True):
                total += sum(gradient / case.size for gradient in gradients)
        for parameter, gradient in zip(trained, sums, strict=True):
            decay = 0.0 if is_exempt(parameter.tensor) else optimizer.weight_decay
            scalars = StepScalars.of(
                step=step + 1,
                learning_rate=rate(step),
                betas=optimizer.betas,
                eps=optimizer.eps,
                weight_decay=decay,
            )
            with torch.no_grad():
                flat = parameter.tensor.view(-1)
                adamw_(flat, *state[parameter.module_name], gradient.view(-1), None, scalars)
    found = {}
    for parameter in trained:
        slots = (parameter.tensor.detach().view(-1), *state[parameter.module_name])
        for slot, values in zip(("master", "exp_avg", "exp_avg_sq"), slots, strict=True):
            found |= {f"{slot}:{part.name}": values[part.start : part.stop] for part in parameter.parts}
    return found


def train(rank: int, size: int, case: OffloadCase) -> dict[str, Tensor]:
    engine = build(case)
    run_steps(engine, rank, case, range(NUM_STEPS))
    return {name: values for name, values in exported(engine).items() if name.split(":")[0] not in ("read", "weight")}


@pytest.mark.parametrize(("stage", "size"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2)])
def test_deepspeed_gives_the_bits_of_the_specification(worker_pools: Any, stage: int, size: int) -> None:
    case = OffloadCase(stage, size, clip=None, offload=PLAN, device="late")
    expected = specified(case)
    ranks = worker_pools(size).run(train, case)
    for name, values in expected.items():
        # Each rank has its flat range, in the order of ranks.
        assert torch.equal(torch.cat([rank[name] for rank in ranks if name in rank]), values), name
