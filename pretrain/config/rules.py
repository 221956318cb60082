"""Rules that join fields of several nodes, and the one place that runs all rules.

A cross-field rule is a small function over the values at the paths it names; it runs when all of them
passed their own checks, whatever else is wrong. Rules of one component alone belong to the ``violations``
of its config class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pretrain.config.components import COMPONENT_FIELDS, component_attribute
from pretrain.config.engine_rules import ENGINE_RULES, LAYOUT
from pretrain.config.launch_rules import LAUNCH_RULES
from pretrain.config.offload_rules import OFFLOAD_RULES
from pretrain.config.ranges import out_of_range
from pretrain.config.schema import EngineConfig, TrainConfig
from pretrain.config.typecheck import dataclass_specs, tagged_members
from pretrain.config.violation import Violation

Rule = Callable[..., Iterator[Violation]]
CROSS_FIELD_RULES: list[tuple[tuple[str, ...], Rule]] = [*ENGINE_RULES, *OFFLOAD_RULES, *LAUNCH_RULES]


def run_rules(sound: Mapping[str, Any]) -> list[Violation]:
    """All violations among the sound values, which are keyed by path (component instances included)."""
    violations = list(out_of_range(sound))
    usable = dict(sound)
    for violation in violations:
        usable.pop(violation.path, None)
    usable.update(_for_engines(usable))
    for paths, rule in CROSS_FIELD_RULES:
        values = [_lookup(usable, path) for path in paths]
        if all(value is not _ABSENT for value in values):
            violations.extend(rule(*values))
    return violations


_ABSENT: Final = object()


def _for_engines(sound: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What rules of engines take: the nodes ``train`` and ``engine``, unsound fields left at their defaults."""
    engines = tagged_members(EngineConfig)
    assert engines is not None
    if (name := sound.get("engine.name")) not in engines:
        return
    for node, cls in (("train", TrainConfig), ("engine", engines[name])):
        paths = {spec.name: f"{node}.{spec.name}" for spec in dataclass_specs(cls)}
        yield node, cls(**{field: sound[path] for field, path in paths.items() if path in sound})
    if not hasattr(engines[name], "tensor_parallel"):
        yield from dict.fromkeys(LAYOUT, 1).items()


def _lookup(sound: Mapping[str, Any], path: str) -> Any:
    """A sound value, or an attribute of a sound component, such as the vocabulary read from its data."""
    if path.endswith("?"):
        value = _lookup(sound, path.removesuffix("?"))
        return None if value is _ABSENT else value
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


def _rule(*paths: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        CROSS_FIELD_RULES.append((paths, rule))
        return rule

    return register


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


@_rule("train.keep_best", "train.eval_interval")
def _best_is_validated(keep_best: int, eval_interval: int) -> Iterator[Violation]:
    if keep_best > 0 and eval_interval == 0:
        yield Violation(
            "train.keep_best",
            keep_best,
            "0 without validation: the best checkpoints are those with the lowest validation loss",
            "train.eval_interval=100, say, or train.keep_best=0",
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
