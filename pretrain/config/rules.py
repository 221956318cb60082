"""Rules of the run configuration: ranges of numbers, and rules that join fields of several nodes.

A cross-field rule is a small function over the values at the paths it names; it runs when all of them
passed their own checks, whatever else is wrong. Rules of one component alone belong to the ``violations``
of its config class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pretrain.config.components import COMPONENT_FIELDS, component_attribute
from pretrain.config.violation import Violation


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; ``None`` means unbounded on that side."""

    low: float | None = None
    high: float | None = None
    is_low_open: bool = False
    is_high_open: bool = False

    def holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = self.low is None or (value > self.low if self.is_low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.is_high_open else value <= self.high)
        return above and below

    def __str__(self) -> str:
        low = "" if self.low is None else f"{'greater than' if self.is_low_open else 'at least'} {self.low:g}"
        high = "" if self.high is None else f"{'less than' if self.is_high_open else 'at most'} {self.high:g}"
        return " and ".join(side for side in (low, high) if side)


POSITIVE_COUNT: Final = Range(low=1)
COUNT: Final = Range(low=0)
POSITIVE: Final = Range(low=0, is_low_open=True)
BETA: Final = Range(low=0, high=1, is_high_open=True)

RANGES: Final[dict[str, Range]] = {
    "run.seed": COUNT,
    "train.steps": POSITIVE_COUNT,
    "train.global_batch_size": POSITIVE_COUNT,
    "train.micro_batch_size": POSITIVE_COUNT,
    "train.clip_grad_norm": POSITIVE,
    "train.log_interval": COUNT,
    "train.eval_interval": COUNT,
    "train.eval_samples": POSITIVE_COUNT,
    "train.checkpoint_interval": COUNT,
    "train.keep_checkpoints": POSITIVE_COUNT,
    "train.sample_interval": COUNT,
    "train.sample_tokens": POSITIVE_COUNT,
    "optimizer.learning_rate": POSITIVE,
    "optimizer.betas[0]": BETA,
    "optimizer.betas[1]": BETA,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": COUNT,
    "optimizer.schedule.warmup_steps": COUNT,
    "optimizer.schedule.horizon": POSITIVE_COUNT,
    "optimizer.schedule.final_ratio": Range(low=0, high=1),
    "engine.reduce_bucket_size": POSITIVE_COUNT,
    "engine.allgather_bucket_size": POSITIVE_COUNT,
    "launcher.num_processes": POSITIVE_COUNT,
    "launcher.threads_per_process": POSITIVE_COUNT,
    "launcher.shutdown_grace_s": POSITIVE,
    "tracking.flush_interval_s": POSITIVE,
}
"""Every number of the schema. ``engine.zero_stage`` has a rule of its own, which gives the reason."""

Rule = Callable[..., Iterator[Violation]]
CROSS_FIELD_RULES: list[tuple[tuple[str, ...], Rule]] = []


def run_rules(sound: Mapping[str, Any]) -> list[Violation]:
    """All violations among the sound values, which are keyed by path (component instances included)."""
    violations = list(_out_of_range(sound))
    usable = dict(sound)
    for violation in violations:
        usable.pop(violation.path, None)
    for paths, rule in CROSS_FIELD_RULES:
        values = [_lookup(usable, path) for path in paths]
        if all(value is not _ABSENT for value in values):
            violations.extend(rule(*values))
    return violations


_ABSENT: Final = object()


def _lookup(sound: Mapping[str, Any], path: str) -> Any:
    """A sound value, or an attribute of a sound component, such as the vocabulary read from its data."""
    if path in sound:
        return sound[path]
    node, _, name = path.partition(".")
    if node not in COMPONENT_FIELDS or node not in sound:
        return _ABSENT
    try:
        value = component_attribute(sound[node], name)
    except (OSError, ValueError):
        return _ABSENT  # say, data not prepared yet: the component's own violations report it
    return _ABSENT if value is None else value


def _out_of_range(sound: Mapping[str, Any]) -> Iterator[Violation]:
    for path, allowed in RANGES.items():
        value = sound.get(path)
        if value is not None and not allowed.holds(value):
            yield Violation(path, value, f"must be {allowed}", f"give a number {allowed}")


def _rule(*paths: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        CROSS_FIELD_RULES.append((paths, rule))
        return rule

    return register


@_rule("train.global_batch_size", "train.micro_batch_size", "launcher.num_processes")
def _global_batch_divides(global_batch: int, micro_batch: int, num_processes: int) -> Iterator[Violation]:
    unit = micro_batch * num_processes
    if global_batch % unit == 0:
        return
    nearest = [n for n in (global_batch // unit * unit, (global_batch // unit + 1) * unit) if n > 0]
    yield Violation(
        "train.global_batch_size",
        global_batch,
        f"a multiple of train.micro_batch_size x data-parallel size = {micro_batch} x {num_processes} = {unit}",
        "nearest: " + " or ".join(f"train.global_batch_size={n}" for n in nearest),
    )


@_rule("data.vocab_size", "model.vocab_size")
def _vocabulary_fits(tokenizer_size: Any, vocab_size: Any) -> Iterator[Violation]:
    if isinstance(tokenizer_size, int) and isinstance(vocab_size, int) and tokenizer_size > vocab_size:
        yield Violation(
            "model.vocab_size",
            vocab_size,
            f"at least the vocabulary of the data's tokenizer, {tokenizer_size}",
            f"model.vocab_size={tokenizer_size}, or data whose tokenizer has at most {vocab_size} tokens",
        )


@_rule("data.sequence_length", "model.max_sequence_length")
def _sequence_fits_model(sequence_length: Any, longest: Any) -> Iterator[Violation]:
    if isinstance(sequence_length, int) and isinstance(longest, int) and sequence_length > longest:
        yield Violation(
            "data.sequence_length",
            sequence_length,
            f"at most model.max_sequence_length = {longest}",
            f"data.sequence_length={longest}, or a larger model.max_sequence_length",
        )


@_rule("optimizer.schedule.warmup_steps", "optimizer.schedule.horizon", "train.steps")
def _warmup_within_horizon(warmup_steps: int, horizon: int | None, steps: int) -> Iterator[Violation]:
    end = steps if horizon is None else horizon
    if warmup_steps > end:
        name = "train.steps" if horizon is None else "optimizer.schedule.horizon"
        yield Violation(
            "optimizer.schedule.warmup_steps",
            warmup_steps,
            f"at most the schedule's horizon, {name} = {end}",
            f"optimizer.schedule.warmup_steps={end} or less, or {name}={warmup_steps} or more",
        )


@_rule("engine.zero_stage")
def _zero_stage_is_supported(zero_stage: int) -> Iterator[Violation]:
    if zero_stage not in (0, 1, 2):
        yield Violation(
            "engine.zero_stage",
            zero_stage,
            "0 (all replicated), 1 (optimizer state sharded) or 2 (gradients sharded too);"
            " stage 3 shards the weights, which the canonical checkpoint does not read or write yet",
            "engine.zero_stage=2",
        )


@_rule("engine.zero_stage", "train.precision")
def _bf16_needs_sharding(zero_stage: int, precision: str) -> Iterator[Violation]:
    if zero_stage == 0 and precision == "bf16":
        yield Violation(
            "engine.zero_stage",
            zero_stage,
            "at least 1 with train.precision=bf16: DeepSpeed accumulates no fp32 gradients at stage 0",
            "engine.zero_stage=1 (works with one process too), or train.precision=fp32",
        )


@_rule("train.sample_interval", "train.sample_prompts")
def _sampling_has_prompts(interval: int, prompts: list[str]) -> Iterator[Violation]:
    if interval > 0 and not prompts:
        yield Violation(
            "train.sample_prompts",
            prompts,
            f"at least one prompt, for train.sample_interval = {interval} asks for samples",
            "train.sample_prompts=['Once'], or train.sample_interval=0",
        )


@_rule("run.name")
def _name_is_a_folder_name(name: str) -> Iterator[Violation]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "run"
        yield Violation(
            "run.name",
            name,
            "a folder name: letters, digits, '.', '_' and '-', starting with a letter or digit",
            f"run.name={cleaned}",
        )


@_rule("run.import_paths")
def _import_paths_exist(import_paths: list[str]) -> Iterator[Violation]:
    for i, path in enumerate(import_paths):
        if not Path(path).expanduser().is_dir():
            yield Violation(f"run.import_paths[{i}]", path, "an existing folder", "correct or remove the path")
