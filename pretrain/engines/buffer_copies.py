"""Persistent buffers (running statistics) as they were before a forward pass, for a step whose update is dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pretrain.parallel.canonical import canonical_buffers


class BufferCopies:
    """Copies of all persistent buffers of ``modules``; models without any cost nothing."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._copies = [(buffer, buffer.clone()) for module in modules for _, buffer in canonical_buffers(module)]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, copy in self._copies:
            buffer.copy_(copy)
