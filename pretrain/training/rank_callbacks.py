"""Which callbacks a rank of a run has, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pretrain.config.freeze import config_digest
from pretrain.config.schema import OptimizerConfig
from pretrain.training import callbacks as own
from pretrain.training.callback import Callback
from pretrain.training.data_metrics import DataMetricsCallback
from pretrain.training.data_state import DataCallback
from pretrain.training.health_callback import HealthCallback
from pretrain.training.health_records import HealthRecords
from pretrain.training.offload_callback import OffloadCallback
from pretrain.training.sampling import TextSampler

if TYPE_CHECKING:
    from data_pipeline.source import DataSources
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.config.schema import Config
    from pretrain.engines.base import Engine
    from pretrain.parallel.process import ProcessEnvironment
    from pretrain.training.health import HealthMonitor


def rank_callbacks(
    run: RunDir,
    tree: Mapping[str, Any],
    config: Config,
    env: ProcessEnvironment,
    *,
    log: own.EventLog,
    fence: Callable[[], None],
    engine: Engine,
    store: CheckpointStore,
    sources: DataSources,
    health: HealthMonitor,
    data_metrics: DataMetricsCallback,
) -> list[Callback]:
    """The callbacks. ``fence`` raises when this attempt no longer holds the run directory.

    Raises:
        ValueError: validation data without an end.
    """
    facts = {
        "data_fingerprint": sources.train.fingerprint,
        "config_digest": config_digest(tree),
        "revision": run.revision(),
        "world_size": env.world_size,
        "precision": config.train.precision,
    }
    if (initial := run.initial_weights()) is not None:
        facts["initial_weights"] = initial["digest"]
    result: list[Callback] = []
    if config.train.trace:
        from pretrain.training.trace import TraceCallback

        result.append(TraceCallback(run.trace_path(env.attempt), env.rank))
    budget = getattr(config.data, "damage_budget", None)
    result.append(DataCallback(log, sources.train, run.quarantine_path, budget))
    records = HealthRecords(run.health_path, env.attempt, fence=fence)
    result.append(HealthCallback(log, health, records, sources, rank=env.rank))
    result.append(data_metrics)
    if isinstance(config.optimizer, OptimizerConfig) and config.optimizer.offload.enabled:
        result.append(OffloadCallback(log, run.offload_path, rank=env.rank))
    result.append(own.MetricsCallback(log))
    # The checkpoint of a step comes before its validation, which may be long and may be cut short.
    result.append(own.CheckpointCallback(store, log, rank=env.rank, attempt=env.attempt, fence=fence, facts=facts))
    if sources.validation is not None:
        if sources.validation.num_samples is None:
            raise ValueError("data: the validation source is endless (num_samples None); validation needs an end")
        result.append(own.EvaluationCallback(log, sources.validation))
    wants_samples = env.rank == 0 and config.train.sample_prompts and sources.tokenizer_path
    if wants_samples and engine.module is not None and TextSampler.supports(engine.module):
        result.append(own.SamplingCallback(log, TextSampler(str(sources.tokenizer_path))))
    return result
