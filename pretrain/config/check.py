"""The check of a whole configuration tree: a typed ``Config``, or one error with every fault. Torch-free."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pretrain.config.components import (
    COMPONENT_FIELDS,
    TARGET,
    ForeignComponent,
    add_import_paths,
    check_component,
)
from pretrain.config.ranges import out_of_range
from pretrain.config.rules import run_rules
from pretrain.config.schema import Config
from pretrain.config.typecheck import (
    MISSING_VALUE,
    UNSOUND,
    Report,
    check_value,
    dataclass_specs,
    join,
    tagged_members,
)
from pretrain.config.violation import InvalidConfigError, Violation, did_you_mean


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a check found. Nodes of ``unusable`` hold values that mean nothing (``config`` has defaults or None there);
    the other violations are of rules between values that are sound by themselves."""

    config: Config
    violations: tuple[Violation, ...]
    unusable: frozenset[str]


def check(tree: Mapping[str, Any], earlier: Sequence[Violation] = ()) -> Config:
    """Check the untyped ``tree`` (plain dicts, lists and scalars) and return it typed.

    Reported together: unknown keys, wrong types, missing values, components that cannot be imported or
    refuse their fields, and every cross-field rule whose inputs passed. ``earlier`` are faults an earlier
    stage found (composition); they come first in the report and are not repeated. Folders in
    ``run.import_paths`` are put on ``sys.path``, because components may live there. Raises
    :class:`InvalidConfigError` with all violations.
    """
    judgement = judge(tree, earlier)
    if judgement.violations:
        raise InvalidConfigError(judgement.violations)
    return judgement.config


def judge(tree: Mapping[str, Any], earlier: Sequence[Violation] = ()) -> Judgement:
    """As :func:`check`, for those who can do something with the part of a faulty tree that is sound."""
    report = Report(violations=list(earlier), known_paths=frozenset(v.path for v in earlier))
    specs = dataclass_specs(Config)
    _check_top_level_keys(tree, [spec.name for spec in specs], report)
    values: dict[str, Any] = {}
    for spec in specs:
        if spec.name in COMPONENT_FIELDS:
            continue
        values[spec.name] = check_value(tree.get(spec.name, {}), spec.annotation, spec.name, report)
    if isinstance(import_paths := report.sound.get("run.import_paths"), list):
        add_import_paths(import_paths)
    for name in COMPONENT_FIELDS:
        node = tree.get(name)
        if node == MISSING_VALUE and name in report.known_paths:
            continue
        values[name] = check_component(node, name, report, suggest_place)
        if values[name] is not None:
            report.sound[name] = values[name]
    alone = [*report.violations, *out_of_range(report.sound)]
    report.violations.extend(run_rules(report.sound))
    usable = {name: value for name, value in values.items() if value is not UNSOUND and value is not None}
    assert report.violations or len(usable) == len(specs)
    faulty = {re.split(r"[.\[]", violation.path)[0] for violation in alone}
    unusable = {spec.name for spec in specs} & (faulty | {spec.name for spec in specs if spec.name not in usable})
    return Judgement(Config(**usable), tuple(report.violations), frozenset(unusable))


def complete_tree(tree: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The plain tree of a checked ``config``, with every default written out; ``tree`` gives the targets.

    This is what a run freezes: a later change of a default in the code does not change a run that exists.
    """
    complete: dict[str, Any] = {}
    for spec in dataclass_specs(Config):
        value = getattr(config, spec.name)
        if spec.name not in COMPONENT_FIELDS:
            complete[spec.name] = plain(value)
        elif isinstance(value, ForeignComponent):
            complete[spec.name] = {TARGET: value.target, **{k: plain(v) for k, v in value.fields.items()}}
        else:
            complete[spec.name] = {TARGET: tree[spec.name][TARGET], **plain(value)}
    return complete


def schema_leaves(cls: type = Config, path: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(dotted path, annotation, metadata) of every leaf field of the schema, components left out.

    Where a node may be one of several classes, the leaves of each; what they share comes once for each.
    """
    metadata = {f.name: f.metadata for f in dataclasses.fields(cls)}
    for spec in dataclass_specs(cls):
        where = join(path, spec.name)
        if where in COMPONENT_FIELDS:
            continue
        members = list((tagged_members(spec.annotation) or {"": spec.annotation}).values())
        if all(isinstance(member, type) and dataclasses.is_dataclass(member) for member in members):
            for member in members:
                yield from schema_leaves(member, where)
        else:
            yield where, spec.annotation, metadata[spec.name]


def suggest_place(key: str) -> str | None:
    """The schema path whose last name is, or is close to, ``key``."""
    places = {path.rpartition(".")[2]: path for path, _, _ in schema_leaves()}
    close = did_you_mean(key, places)
    return None if close is None else places[close]


def _check_top_level_keys(tree: Mapping[str, Any], names: list[str], report: Report) -> None:
    for key, value in tree.items():
        if key in names:
            continue
        close = did_you_mean(str(key), names) or suggest_place(str(key))
        fix = f"did you mean {close}?" if close else f"remove it; known keys here: {', '.join(names)}"
        report.fault(str(key), value, "unknown key of the configuration", fix)


def plain(value: Any) -> Any:
    """Dataclasses as dicts of their constructor fields and tuples as lists: what YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
