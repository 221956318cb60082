"""The frozen configuration of a run: writing, reading, comparing and extending the resolved tree. Torch-free.

A run directory holds the tree that was checked when the run was created; ranks, restarts and requeues read
it and never compose again. A continued run may change extendable fields only; every change is a new
numbered revision.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pretrain.config.check import check, complete_tree, plain, schema_leaves
from pretrain.config.components import (
    COMPONENT_FIELDS,
    TARGET,
    add_import_paths,
    is_config_class,
    resolve_target,
)
from pretrain.config.compose import parse_override, resolve_paths, shipped_option
from pretrain.config.typecheck import MISSING_VALUE
from pretrain.config.violation import InvalidConfigError, Violation, did_you_mean

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from pretrain.config.schema import Config

ABSENT: Final = "<absent>"


@dataclass(frozen=True)
class Difference:
    """A leaf that two trees do not share; a side without the key holds ``ABSENT``."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.before!r} -> {self.after!r}"


def dump(tree: Mapping[str, Any]) -> str:
    """Canonical YAML: keys sorted, no aliases. Equal trees give equal text; floats keep every bit."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(dict(tree), Dumper=Dumper, sort_keys=True, default_flow_style=False, width=100)


def load(text: str, source: str = "the frozen configuration") -> dict[str, Any]:
    """Read what :func:`dump` wrote. Raises ``ValueError``, naming ``source``, for anything else."""
    import yaml

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML ({error}); restore it or use an earlier revision") from error
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise ValueError(f"{source} holds {kind}, expected a mapping; restore it or use an earlier revision")
    return tree


def config_digest(tree: Mapping[str, Any]) -> str:
    """Hex digest (128-bit BLAKE2b) of the tree's content, independent of the order of keys."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def frozen_for_new_run(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree to freeze for a new run: a null ``optimizer.schedule.horizon`` becomes ``train.steps``."""
    frozen = deepcopy(dict(tree))
    schedule = frozen["optimizer"]["schedule"]
    if schedule["horizon"] is None:
        schedule["horizon"] = frozen["train"]["steps"]
    return frozen


def freeze_components(tree: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """``tree`` with what components write down when a run begins (``frozen()`` of a config class), such as the edition
    of a data set. Later changes of the world outside then do not change the run."""
    frozen = deepcopy(dict(tree))
    for name in COMPONENT_FIELDS:
        component = getattr(config, name)
        if hasattr(component, "frozen"):
            frozen[name] = {TARGET: tree[name][TARGET], **plain(component.frozen())}
    return frozen


def extend(
    frozen_tree: Mapping[str, Any], overrides: Sequence[str], cwd: str | None = None
) -> tuple[dict[str, Any], list[Difference]]:
    """The frozen tree with ``key=value`` overrides of extendable fields, and what they change.

    A whole node whose fields are all extendable may be replaced, wherever the override stands: ``engine=megatron`` by
    the shipped file of that group, ``engine={name: deepspeed, zero_stage: 3}`` by the given fields and defaults.
    The schedule's horizon stays unless it is overridden by name (``null`` sets it to the new
    ``train.steps``). An override that repeats the frozen value is no change and is accepted for any field.
    Relative paths start at ``cwd``. Raises :class:`InvalidConfigError` with every refused override and
    every fault of the new tree together.
    """
    extendable = extendable_paths(frozen_tree)
    violations: list[Violation] = []
    parsed: list[Override] = []
    tree = deepcopy(dict(frozen_tree))
    for text in overrides:
        try:
            parsed.append(parse_override(text))
        except InvalidConfigError as error:
            violations.extend(error.violations)
    # Nodes before their fields, as in composition: engine.tensor_parallel=2 engine=megatron means what it says.
    for override in sorted(parsed, key=lambda override: "." in override.key_or_group):
        if (refusal := _extend_one(tree, override, extendable)) is not None:
            violations.append(refusal)
    _forget_settings_of_what_was_switched_off(tree, frozen_tree, {override.key_or_group for override in parsed})
    tree = frozen_for_new_run(resolve_paths(tree, cwd or os.getcwd()))
    config = check(tree, violations)
    tree = complete_tree(tree, config)
    # A default that came into the schema after the run was frozen is written out, but it changes nothing.
    named = tuple(f"{override.key_or_group}." for override in parsed)
    changes = [
        change
        for change in differences(frozen_tree, tree)
        if change.before is not ABSENT or f"{change.path}.".startswith(named)
    ]
    return tree, changes


def extendable_paths(tree: Mapping[str, Any]) -> list[str]:
    """Paths of all fields that a continued run may change, those of the tree's component classes included."""
    paths = list(dict.fromkeys(path for path, _, metadata in schema_leaves() if metadata.get("extendable")))
    add_import_paths(tree["run"]["import_paths"])
    for name in COMPONENT_FIELDS:
        cls = resolve_target(tree[name][TARGET], f"{name}.{TARGET}")
        if is_config_class(cls):
            for f in dataclasses.fields(cls):
                if f.metadata.get("extendable"):
                    below = tree[name].get(f.name)
                    paths.append(f"{name}.{f.name}")
                    paths += [f"{name}.{f.name}.{key}" for key in below] if isinstance(below, dict) else []
    return paths


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Every leaf on which two trees differ, sorted by path. A list is one leaf; ``1`` equals ``1.0``."""
    left, right = dict(_leaves(a, "")), dict(_leaves(b, ""))
    paths = sorted(left.keys() | right.keys())
    pairs = ((path, left.get(path, ABSENT), right.get(path, ABSENT)) for path in paths)
    return [Difference(path, before, after) for path, before, after in pairs if before != after]


def _forget_settings_of_what_was_switched_off(
    tree: dict[str, Any], frozen_tree: Mapping[str, Any], overridden: set[str]
) -> None:
    """``optimizer.offload.enabled=false`` alone is enough: the block's other fields, which nothing would read, go back
    to their defaults unless they are overridden too."""
    path = "optimizer.offload"
    before, after = ((t.get("optimizer") or {}).get("offload") for t in (frozen_tree, tree))
    if isinstance(before, Mapping) and isinstance(after, dict) and before.get("enabled") and not after.get("enabled"):
        for name in [name for name in after if name != "enabled" and f"{path}.{name}" not in overridden]:
            del after[name]


def _extend_one(tree: dict[str, Any], override: Override, extendable: list[str]) -> Violation | None:
    key = override.key_or_group
    node: Any = tree
    *parents, name = key.split(".")
    for parent in parents:
        node = node.get(parent, {}) if isinstance(node, dict) else {}
    known = node.get(name, ABSENT) if isinstance(node, dict) else ABSENT
    if key in _replaceable_nodes() and not override.is_delete() and override.package is None:
        return _replace_node(tree, override)
    if override.is_delete() or override.package is not None or key not in extendable:
        if known is not ABSENT and not override.is_delete() and known == override.value():
            return None
        close = did_you_mean(key, extendable) if known is ABSENT else None
        return Violation(
            key,
            override.input_line,
            "a continued run may change extendable fields only",
            f"did you mean {close}?" if close else f"start a new run, or change one of: {', '.join(extendable)}",
        )
    value = override.value()
    if isinstance(value, str) and ("${" in value or value == MISSING_VALUE):
        return _interpolation_fault(key, value)
    node = tree
    for parent in parents:  # a node that came into the schema after the run was frozen is not there yet
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return None  # the check that follows reports what stands there
    node[name] = value
    return None


def _replaceable_nodes() -> set[str]:
    """Nodes below the root of which every field is extendable, so that a continued run may have another one."""
    nodes: dict[str, list[bool]] = {}
    for path, _, metadata in schema_leaves():
        nodes.setdefault(path.partition(".")[0], []).append(bool(metadata.get("extendable")))
    return {node for node, fields in nodes.items() if all(fields)}


def _replace_node(tree: dict[str, Any], override: Override) -> Violation | None:
    key, value = override.key_or_group, override.value()
    if isinstance(value, dict):
        if "${" in str(value):
            return _interpolation_fault(key, value)
    else:
        try:
            value = shipped_option(key, str(value))
        except InvalidConfigError as error:
            return error.violations[0]
    tree[key] = value
    return None


def _interpolation_fault(key: str, value: object) -> Violation:
    return Violation(key, value, "a plain value: a frozen configuration holds no interpolations", "write it out")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
