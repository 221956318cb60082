"""Does a checkpoint hold the configured model? Answered without an engine, before anything starts or changes."""

from __future__ import annotations

from pathlib import Path

from pretrain.config.schema import Config


def check_checkpoint_model(config: Config, folder: Path) -> None:
    """Compare the whole model with a checkpoint by names and shapes; no parameter is allocated.

    A pipeline stage knows only its own layers, so this is where a layer too many is noticed. Models that are not built
    from parallel layers are compared by their engine, on every rank alike, when they are loaded.

    Raises:
        CheckpointError: listing every missing, unexpected or differently shaped tensor.
    """
    if not hasattr(config.model, "parallel_violations"):
        return
    import torch

    from pretrain.checkpoint.reader import CheckpointReader, check_model
    from pretrain.config.components import build_component
    from pretrain.parallel.layers import TorchLayers

    with torch.device("meta"):
        model = build_component(config.model, layers=TorchLayers())
    check_model(model, CheckpointReader(folder))
