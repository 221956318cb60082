"""The same work for every arm: initial weights, batches and loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from offload.sizes import Size, rows
from pretrain.objectives.cross_entropy import cross_entropy_rows
from pretrain.objectives.protocol import LossOutput
from pretrain.parallel.layers import TorchLayers

STD = 0.02
ROWS_AT_ONCE = 4096
"""Rows of logits that are widened to FP32 at once on a GPU."""


def build_model(size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """The model on ``device`` with activation checkpointing; initial values are those of BF16, whatever ``dtype``.

    Values are drawn on the GPU where there is one, also for a model on the host.
    """
    drawing = torch.device("cuda") if torch.cuda.is_available() else device
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _uninitialised(), torch.device(device):
            model = size.model().build(TorchLayers())
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)  # the scale of a norm
                continue
            number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")
            generator = torch.Generator(drawing).manual_seed(number)
            values = torch.empty(parameter.shape, dtype=torch.float32, device=drawing)
            parameter.copy_(values.normal_(0.0, STD, generator=generator).bfloat16())
    model.activation_checkpointing = True
    if drawing.type == "cuda":
        torch.cuda.empty_cache()
    return model


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Modules made inside do not draw initial values of their own: on the host that takes minutes."""
    with (
        patch.object(nn.Linear, "reset_parameters", lambda module: None),
        patch.object(nn.Embedding, "reset_parameters", lambda module: None),
    ):
        yield


def batches(size: Size, tokens: int, micro_tokens: int, device: torch.device, seed: int) -> Iterator[list[Tensor]]:
    """Micro-batches of one step after another: token ids ``[rows, length + 1]``.

    Random, small ids more often, so that there is something to learn and losses tell updates apart.

    Raises:
        ValueError: micro-batches that do not divide a step.
    """
    num_rows, length = rows(size, tokens)
    micro_rows = rows(size, min(micro_tokens, tokens))[0]
    if num_rows % micro_rows:
        raise ValueError(f"--micro-tokens {micro_tokens} does not divide --tokens {tokens}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = (torch.rand(num_rows, length + 1, generator=generator).pow_(4) * size.vocabulary).long()
        yield list(ids.to(device).split(micro_rows))


class Loss:
    """Cross-entropy in nats, summed over the tokens of a micro-batch."""

    def __call__(self, model: Callable[..., Tensor], batch: Any) -> LossOutput:
        ids = batch["tokens"].t()
        logits_RV = model(ids[:-1].contiguous()).flatten(0, 1)
        targets_R = ids[1:].flatten()
        if logits_RV.device.type == "cpu":
            return LossOutput(cross_entropy_rows(logits_RV, targets_R)[0].sum())
        parts = zip(logits_RV.split(ROWS_AT_ONCE), targets_R.split(ROWS_AT_ONCE), strict=True)
        return LossOutput(torch.stack([cross_entropy_rows(rows_, own)[0].sum() for rows_, own in parts]).sum())
