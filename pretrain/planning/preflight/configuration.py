"""Concern: the configuration's own rules, divisibility and layout among them. Torch-free.

They are judged where configurations are checked (:mod:`pretrain.config`); here they become findings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pretrain.config.layout import data_parallel_size, model_parallel_size
from pretrain.config.rules import CROSS_FIELD_RULES
from pretrain.config.schema import MegatronConfig
from pretrain.config.violation import Violation
from pretrain.planning.preflight.findings import Finding, error, ok
from pretrain.planning.preflight.subject import Subject


def faults(violations: Iterable[Violation]) -> Iterator[Finding]:
    """Violations as errors."""
    for violation in violations:
        shown = repr(violation.found)
        yield error(violation.path, shown if len(shown) <= 200 else shown[:197] + "...", violation.rule, violation.fix)


def check(subject: Subject) -> Iterator[Finding]:
    """Every violation as an error; of a sound configuration what its layout comes to."""
    yield from faults(subject.violations)
    if subject.violations:
        return
    config, engine = subject.config, subject.config.engine
    yield ok("rules", f"types, ranges, components and {len(CROSS_FIELD_RULES)} rules between fields hold")
    data_parallel = data_parallel_size(config)
    ranks = config.launcher.num_processes
    if isinstance(engine, MegatronConfig):
        split = f"tensor {engine.tensor_parallel} x pipeline {engine.pipeline_parallel} x data {data_parallel}"
    else:
        split = f"data {data_parallel}, ZeRO stage {engine.zero_stage}"
    nodes = f" on {subject.num_nodes} nodes of {subject.ranks_per_node}" if subject.slurm is not None else ""
    yield ok("layout", f"{ranks} ranks{nodes} = {split}", ranks=ranks, model_parallel=model_parallel_size(engine))
    train = config.train
    micro_batches = train.global_batch_size // (train.micro_batch_size * data_parallel)
    yield ok(
        "train.global_batch_size",
        f"{train.global_batch_size} = data {data_parallel} x {micro_batches} micro-batches x {train.micro_batch_size}",
        micro_batches=micro_batches,
    )
