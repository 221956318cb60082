"""Checking plain YAML values against the annotations of dataclasses and signatures, collecting every fault.

Strict on purpose: nothing is converted but a whole number where a float is asked for and a list where a
tuple is asked for. ``steps: "200"`` is a mistake to report, not a string to parse. Torch-free.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pretrain.config.violation import Violation, did_you_mean

MISSING_VALUE: Final = "???"
"""What OmegaConf writes for a mandatory value that nobody gave."""

TAG: Final = "name"
"""The field by whose value the members of a union of dataclasses are told apart."""

ONLY_HERE: Final = "only_here"
"""Metadata of a field: why only this member of a union has it, for those who ask another member for it."""

UNSOUND: Final = object()
"""Stands for a value that did not pass; nothing may be concluded from it."""

NO_DEFAULT: Final = object()


@dataclass(frozen=True)
class FieldSpec:
    """A key that a node may hold: its annotation and its default (``NO_DEFAULT`` when it must be given)."""

    name: str
    annotation: Any
    default: Any


@dataclass
class Report:
    """What a walk over the tree found.

    ``sound`` maps the path of every value that passed (defaults included) to the typed value, for the
    cross-field rules. ``known_paths`` are paths whose fault an earlier stage has reported already.
    """

    violations: list[Violation] = field(default_factory=list)
    sound: dict[str, Any] = field(default_factory=dict)
    known_paths: frozenset[str] = frozenset()

    def fault(self, path: str, found: object, rule: str, fix: str) -> None:
        self.violations.append(Violation(path, found, rule, fix))


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def dataclass_specs(cls: type) -> list[FieldSpec]:
    """The constructor fields of a dataclass, in order."""
    hints = _type_hints(cls)
    return [FieldSpec(f.name, hints.get(f.name, Any), _dataclass_default(f)) for f in dataclasses.fields(cls) if f.init]


def signature_specs(target: Callable[..., Any]) -> tuple[list[FieldSpec], bool]:
    """The keyword parameters of a callable, and whether it takes further ones through ``**kwargs``.

    Raises ``ValueError`` when the callable has no readable signature.
    """
    signature = inspect.signature(target)
    hints = _type_hints(target.__init__ if inspect.isclass(target) else target)
    specs = []
    is_open = False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            default = NO_DEFAULT if parameter.default is parameter.empty else parameter.default
            specs.append(FieldSpec(name, hints.get(name, Any), default))
    return specs, is_open


def tagged_members(annotation: Any) -> dict[str, type] | None:
    """The members of a union of dataclasses by their tag, in order; None for any other annotation.

    Each member has a field ``name`` whose annotation is a ``Literal`` of one text.
    """
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return None
    members: dict[str, type] = {}
    for member in typing.get_args(annotation):
        tags = typing.get_args(_type_hints(member).get(TAG)) if dataclasses.is_dataclass(member) else ()
        if len(tags) != 1 or not isinstance(tags[0], str):
            return None
        members[tags[0]] = member
    return members


def check_node(
    node: Mapping[Any, Any],
    specs: Sequence[FieldSpec],
    path: str,
    report: Report,
    *,
    is_open: bool = False,
    suggest: Callable[[str], str | None] = lambda key: None,
    owner: Callable[[str], str | None] = lambda key: None,
) -> dict[str, Any] | None:
    """Check the keys and values of ``node`` against ``specs``; the typed values, or None when any is faulty.

    Defaults of keys that are absent are recorded as sound but not returned. For an unknown key, ``suggest``
    may name a better place, and ``owner`` tell what else knows it and what to do.
    """
    names = [spec.name for spec in specs]
    before = len(report.violations)
    is_sound = True
    for key in node:
        if key not in names and not is_open:
            fix = owner(str(key)) or _unknown_key_fix(str(key), names, path, suggest)
            report.fault(join(path, str(key)), node[key], f"unknown key of {path or 'the configuration'}", fix)
    values: dict[str, Any] = {}
    for spec in specs:
        where = join(path, spec.name)
        if spec.name not in node or _is_missing(node[spec.name]):
            if where in report.known_paths:
                is_sound = False
            elif spec.name in node or spec.default is NO_DEFAULT:
                report.fault(
                    where,
                    node.get(spec.name),
                    f"required: {describe_type(spec.annotation)}, and it has no default",
                    f"give it, as {where}=... on the command line or in a config file",
                )
            else:
                record_sound(spec.default, where, report)
            continue
        value = check_value(node[spec.name], spec.annotation, where, report, default=spec.default)
        is_sound = is_sound and value is not UNSOUND
        values[spec.name] = value
    values.update({key: node[key] for key in node if key not in names})
    return values if is_sound and len(report.violations) == before else None


def check_value(value: Any, annotation: Any, path: str, report: Report, *, default: Any = NO_DEFAULT) -> Any:
    """The typed value, or ``UNSOUND`` after reporting why it does not fit ``annotation``."""
    if _is_missing(value):
        if path not in report.known_paths:
            report.fault(path, value, f"required: {describe_type(annotation)}", f"give it, as {path}=...")
        return UNSOUND
    checked = _check(value, annotation, path, report, default)
    if checked is not UNSOUND:
        report.sound[path] = checked
    return checked


def record_sound(value: Any, path: str, report: Report) -> None:
    """Record a default, and the fields below it, as sound."""
    report.sound[path] = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            record_sound(getattr(value, f.name), join(path, f.name), report)


def describe_type(annotation: Any) -> str:
    """An annotation in words: ``a whole number or null``."""
    if members := tagged_members(annotation):
        return f"a mapping whose {TAG} is {' or '.join(members)}"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Literal:
        return "one of " + ", ".join(_yaml_word(choice) for choice in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if dataclasses.is_dataclass(annotation):
        return "a mapping with " + ", ".join(f.name for f in dataclasses.fields(annotation))
    if _is_list(annotation, origin):
        return "a list" + (f" in which each element is {describe_type(args[0])}" if args else "")
    if origin is tuple or annotation is tuple:
        if not args or args[-1] is Ellipsis:
            return "a list" + (f" in which each element is {describe_type(args[0])}" if args else "")
        return f"a list of {len(args)}: " + ", ".join(describe_type(arg) for arg in args)
    if _is_mapping(annotation, origin):
        return "a mapping"
    return getattr(annotation, "__name__", str(annotation))


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    None: "null",
    Any: "any value",
}


def _check(value: Any, annotation: Any, path: str, report: Report, default: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _check(value, args[0], path, report, default)
    if members := tagged_members(annotation):
        return _check_tagged(value, members, annotation, path, report, default)
    if origin in (typing.Union, types.UnionType):
        return _check_union(value, annotation, path, report, default)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        return _wrong(value, annotation, path, report, default)
    if annotation in (None, type(None)):
        return None if value is None else _wrong(value, annotation, path, report, default)
    if annotation is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number else _wrong(value, annotation, path, report, default)
    if annotation is int:
        is_int = isinstance(value, int) and not isinstance(value, bool)
        return value if is_int else _wrong(value, annotation, path, report, default)
    if annotation in (str, bool):
        return value if isinstance(value, annotation) else _wrong(value, annotation, path, report, default)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if not isinstance(value, dict):
            return _wrong(value, annotation, path, report, default)
        return _check_dataclass(value, annotation, path, report)
    if _is_list(annotation, origin) or origin is tuple or annotation is tuple:
        return _check_sequence(value, annotation, path, report, default)
    if _is_mapping(annotation, origin):
        if not isinstance(value, dict):
            return _wrong(value, annotation, path, report, default)
        return _check_mapping(value, args, path, report)
    # Any, or a class that YAML cannot express: its own constructor judges it.
    return value


def _check_dataclass(
    value: dict[Any, Any], cls: type, path: str, report: Report, owner: Callable[[str], str | None] = lambda key: None
) -> Any:
    values = check_node(value, dataclass_specs(cls), path, report, owner=owner)
    if values is None:
        return UNSOUND
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        report.fault(path, value, f"{cls.__name__} refuses these values: {error}", "change them as it says")
        return UNSOUND


def _check_tagged(
    value: Any, members: dict[str, type], annotation: Any, path: str, report: Report, default: Any
) -> Any:
    """Check against the member that the tag names; without a tag, against the first one."""
    if not isinstance(value, dict):
        return _wrong(value, annotation, path, report, default)
    first = next(iter(members))
    tag = value.get(TAG, first)
    if _is_missing(tag):
        # The member reports the tag itself; its other fields are judged as those of the first.
        return _check_dataclass(value, members[first], path, report)
    if not isinstance(tag, str) or tag not in members:
        where = join(path, TAG)
        close = did_you_mean(str(tag), members)
        fix = f"did you mean {path}={close}?" if close else f"{path}={first}"
        report.fault(where, tag, f"must be {' or '.join(members)}", fix)
        return UNSOUND

    def owner(key: str) -> str | None:
        for other, member in members.items():
            for f in dataclasses.fields(member):
                if f.init and f.name == key:
                    why = f" ({f.metadata[ONLY_HERE]})" if ONLY_HERE in f.metadata else ""
                    return f"{key} belongs to {path} {other}{why}; remove it here, or choose {path}={other}"
        return None

    return _check_dataclass(value, members[tag], path, report, owner)


def _check_union(value: Any, annotation: Any, path: str, report: Report, default: Any) -> Any:
    attempts = []
    for member in typing.get_args(annotation):
        scratch = Report(known_paths=report.known_paths)
        attempts.append((_check(value, member, path, scratch, default), scratch))
    passed = [attempt for attempt in attempts if attempt[0] is not UNSOUND]
    # An exact match wins over the conversion of a whole number: ``float | int`` keeps 3 an int.
    passed.sort(key=lambda attempt: type(attempt[0]) is not type(value))
    if passed:
        checked, scratch = passed[0]
        report.sound.update(scratch.sound)
        return checked
    # A member that fails only in its depth had the right shape: its faults say more than "none fits".
    deep = [scratch for _, scratch in attempts if all(v.path != path for v in scratch.violations)]
    if len(deep) == 1:
        report.sound.update(deep[0].sound)
        report.violations.extend(deep[0].violations)
        return UNSOUND
    return _wrong(value, annotation, path, report, default)


def _check_sequence(value: Any, annotation: Any, path: str, report: Report, default: Any) -> Any:
    args = typing.get_args(annotation)
    is_tuple = typing.get_origin(annotation) is tuple or annotation is tuple
    is_fixed = is_tuple and bool(args) and args[-1] is not Ellipsis
    if not isinstance(value, list | tuple) or (is_fixed and len(value) != len(args)):
        return _wrong(value, annotation, path, report, default)
    kinds: Iterator[Any] = iter(args) if is_fixed else iter([args[0] if args else Any] * len(value))
    items = [
        check_value(item, kind, f"{path}[{i}]", report) for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    ]
    if any(item is UNSOUND for item in items):
        return UNSOUND
    return tuple(items) if is_tuple else items


def _check_mapping(value: dict[Any, Any], args: tuple[Any, ...], path: str, report: Report) -> Any:
    key_kind, value_kind = args or (Any, Any)
    result: dict[Any, Any] = {}
    are_keys_sound = True
    for key, item in value.items():
        if _check(key, key_kind, path, Report(), NO_DEFAULT) is UNSOUND:
            report.fault(path, key, f"each key is {describe_type(key_kind)}", f"rename the key {key!r}")
            are_keys_sound = False
        result[key] = check_value(item, value_kind, join(path, str(key)), report)
    return result if are_keys_sound and all(item is not UNSOUND for item in result.values()) else UNSOUND


def _wrong(value: Any, annotation: Any, path: str, report: Report, default: Any) -> Any:
    report.fault(path, value, f"must be {describe_type(annotation)}", _type_fix(value, annotation, path, default))
    return UNSOUND


def _type_fix(value: Any, annotation: Any, path: str, default: Any) -> str:
    if typing.get_origin(annotation) is Literal and isinstance(value, str):
        close = did_you_mean(value, [str(choice) for choice in typing.get_args(annotation)])
        if close is not None:
            return f"did you mean {path}={close}?"
    members = typing.get_args(annotation) or (annotation,)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and int in members:
        return f"write it without a fraction or exponent: {path}={int(value)}"
    if isinstance(value, str) and (int in members or float in members) and _is_number(value):
        return (
            f"write the number without quotes: {path}={value}"
            " (from an environment variable: ${oc.decode:${oc.env:NAME}})"
        )
    if str in members and isinstance(value, int | float) and not isinstance(value, bool):
        colons = "; without quotes YAML takes 12:00:00 for a number of seconds" if path.endswith("time_limit") else ""
        return f'put it in quotes, as a number is no text: {path}=\'"{value}"\' (in a file: "{value}"){colons}'
    if default is not NO_DEFAULT and not dataclasses.is_dataclass(default):
        return f"give {describe_type(annotation)}; the default is {_yaml_word(default)}"
    return f"give {describe_type(annotation)}"


def _unknown_key_fix(key: str, names: list[str], path: str, suggest: Callable[[str], str | None]) -> str:
    if (close := did_you_mean(key, names)) is not None:
        return f"did you mean {join(path, close)}?"
    if (elsewhere := suggest(key)) is not None:
        return f"did you mean {elsewhere}?"
    return f"remove it; known keys here: {', '.join(names) or 'none'}"


def _type_hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target)
    except Exception:  # names that exist only for type checkers, or no annotations at all: nothing to check against
        return {}


def _dataclass_default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return NO_DEFAULT


def _is_list(annotation: Any, origin: Any) -> bool:
    return annotation is list or origin in (list, collections.abc.Sequence, collections.abc.Iterable)


def _is_mapping(annotation: Any, origin: Any) -> bool:
    return annotation is dict or origin in (dict, collections.abc.Mapping)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING_VALUE


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _yaml_word(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
