"""Micro-batches from host arrays to the engine's device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from pretrain.engines.base import Batch

SAMPLE_IDS = "sample_ids"


def to_tensors(arrays: Mapping[str, np.ndarray]) -> Batch:
    """Host tensors sharing the arrays' memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; pinned and asynchronous towards CUDA. ``sample_ids`` stays on the host, as a key."""
    if device.type == "cpu":
        return batch
    return {
        name: tensor if name == SAMPLE_IDS else tensor.pin_memory().to(device, non_blocking=True)
        for name, tensor in batch.items()
    }
