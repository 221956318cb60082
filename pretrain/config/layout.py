"""How a configuration divides its processes. Torch-free."""

from __future__ import annotations

from pretrain.config.schema import Config, EngineConfig, MegatronConfig


def model_parallel_size(engine: EngineConfig) -> int:
    """Ranks that together hold one copy of the model and work on the same micro-batches."""
    return engine.tensor_parallel * engine.pipeline_parallel if isinstance(engine, MegatronConfig) else 1


def data_parallel_size(config: Config) -> int:
    """Ranks that work on different micro-batches (a checked configuration: the division is exact)."""
    return config.launcher.num_processes // model_parallel_size(config.engine)
