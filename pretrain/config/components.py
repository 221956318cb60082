"""Components: nodes ``{_target_: "pkg.mod.Class", ...fields}`` that name a class of ours or of the user's.

A dataclass with a ``build`` method is a *config class*: it is checked by its fields, instantiated when the
run is checked, and ``build(...)`` gives the object. Any other callable is checked by its signature and
called with the fields when the object is needed. A callable that wants a value of another node says so in
its node (``seed: ${run.seed}``). Torch-free: importing this module imports no component.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

from pretrain.config.typecheck import Report, check_node, dataclass_specs, join, signature_specs
from pretrain.config.violation import InvalidConfigError, Violation, did_you_mean

TARGET: Final = "_target_"
COMPONENT_FIELDS: Final = ("model", "data", "objective")


@dataclass(frozen=True)
class ForeignComponent:
    """A checked node whose target is no config class: ``build`` calls the target with the fields."""

    target: str
    fields: dict[str, Any]

    def build(self) -> Any:
        """Import the target and call it. Raises :class:`InvalidConfigError` when the import fails."""
        return resolve_target(self.target, TARGET)(**self.fields)


def build_component(component: Any, **build_args: Any) -> Any:
    """The object behind a component: ``component.build(**build_args)``.

    ``component`` is what :func:`pretrain.config.check.check` put into the ``Config``, or a raw node, which
    is then checked first. A foreign component takes its fields alone, never ``build_args``. Raises
    :class:`InvalidConfigError` for a faulty node.
    """
    if isinstance(component, Mapping):
        report = Report()
        component = check_component(component, "component", report)
        if report.violations:
            raise InvalidConfigError(report.violations)
    return component.build() if isinstance(component, ForeignComponent) else component.build(**build_args)


def add_import_paths(paths: Iterable[str]) -> None:
    """Put folders on ``sys.path`` (after what is there, so that none can shadow an installed package)."""
    for path in paths:
        folder = os.path.abspath(os.path.expanduser(path))
        if folder not in sys.path:
            sys.path.append(folder)
    importlib.invalidate_caches()


def is_config_class(target: object) -> TypeGuard[type]:
    return inspect.isclass(target) and dataclasses.is_dataclass(target) and callable(getattr(target, "build", None))


def resolve_target(target: str, path: str) -> Callable[..., Any]:
    """Import ``pkg.mod.Class`` (also a nested class or a class method).

    ``path`` names the configuration field for the message. Raises :class:`InvalidConfigError` with one
    violation that tells a missing package, a failing import, a missing name and a thing that cannot be
    called apart.
    """
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise _target_fault(path, target, "a target is a dotted import path", "write it as package.module.Class")
    found, consumed = _import_longest(parts, target, path)
    for name in parts[consumed:]:
        owner, found = found, getattr(found, name, None)
        if found is None:
            close = did_you_mean(name, dir(owner))
            where = getattr(owner, "__name__", repr(owner))
            hint = f"did you mean {close!r}?" if close else f"check the spelling against {_file_of(owner)}"
            raise _target_fault(path, target, f"{where} must define {name!r}", hint)
    if not callable(found):
        raise _target_fault(
            path,
            target,
            f"the target must be a class or a function, not {type(found).__name__}",
            "name a class",
        )
    return found


def check_component(
    node: object, path: str, report: Report, known_places: Callable[[str], str | None] | None = None
) -> Any:
    """Check a component node; the component instance, or None after reporting every fault into ``report``."""
    if not isinstance(node, Mapping):
        report.fault(
            path,
            node,
            f"a component: a mapping that names its class with {TARGET}",
            f"choose a {path} config group, or set {path}.{TARGET}=package.module.Class",
        )
        return None
    where = join(path, TARGET)
    target = node.get(TARGET)
    if not isinstance(target, str):
        report.fault(where, target, f"{TARGET} names the class, as text", f"set {where}=package.module.Class")
        return None
    try:
        cls = resolve_target(target, where)
    except InvalidConfigError as error:
        report.violations.extend(error.violations)
        return None
    fields = {key: value for key, value in node.items() if key != TARGET}
    suggest = known_places or (lambda key: None)
    if is_config_class(cls):
        return _check_config_class(cls, fields, path, report, suggest)
    return _check_foreign(cls, target, fields, path, report, suggest)


def component_attribute(component: Any, name: str) -> Any:
    """A field or attribute of a component, or None when it has none of this name."""
    if isinstance(component, ForeignComponent):
        return component.fields.get(name)
    return getattr(component, name, None)


def with_renamed_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A frozen tree with the fields of an earlier version under their present names.

    A config class of this platform lists such fields in ``renamed_fields``, {old name: dotted new path}. New
    configurations are not translated: there an old name is a fault whose fix names the new one.
    """
    upgraded = dict(tree)
    for name in COMPONENT_FIELDS:
        node = tree.get(name)
        target = node.get(TARGET) if isinstance(node, Mapping) else None
        # Classes of a user's are not imported for this: their import path is not set where trees are only read.
        if not isinstance(node, Mapping) or not str(target).startswith(("pretrain.", "data_pipeline.")):
            continue
        try:
            renamed = getattr(resolve_target(str(target), TARGET), "renamed_fields", {})
        except InvalidConfigError:
            continue  # the check reports it
        fields = {key: value for key, value in node.items() if key not in renamed}
        for old in renamed.keys() & node.keys():
            *parents, last = renamed[old].split(".")
            inner = fields
            for parent in parents:
                inner[parent] = dict(inner.get(parent) or {})
                inner = inner[parent]
            inner.setdefault(last, node[old])
        upgraded[name] = fields
    return upgraded


def path_fields(node: object) -> tuple[str, ...]:
    """The fields of a component node that hold file paths, by the ``path_fields`` of its class."""
    target = node.get(TARGET) if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        return ()
    try:
        return tuple(getattr(resolve_target(target, TARGET), "path_fields", ()))
    except InvalidConfigError:
        return ()  # the check reports the target itself


def _check_config_class(
    cls: type, fields: dict[str, Any], path: str, report: Report, suggest: Callable[[str], str | None]
) -> Any:
    specs = dataclass_specs(cls)
    renamed: Mapping[str, str] = getattr(cls, "renamed_fields", {})
    outdated = [key for key in fields if key in renamed]
    for key in outdated:
        place = join(path, renamed[key])
        report.fault(join(path, key), fields.pop(key), f"this field is now called {place}", f"write {place} instead")
    values = check_node(fields, specs, path, report, suggest=suggest)
    is_whole = values is not None and not outdated
    if values is None:
        # An unknown key must not hide what is wrong with the known ones.
        names = {spec.name for spec in specs}
        values = check_node({key: fields[key] for key in fields if key in names}, specs, path, Report())
    if values is None:
        return None
    try:
        instance = cls(**values)
    except (TypeError, ValueError) as error:
        report.fault(path, fields, f"{cls.__name__} refuses these values: {error}", "change them as it says")
        return None
    for name, found, rule, fix in getattr(instance, "violations", tuple)():
        report.fault(join(path, name) if name else path, found, rule, fix)
    return instance if is_whole else None


def _check_foreign(
    target: Callable[..., Any],
    name: str,
    fields: dict[str, Any],
    path: str,
    report: Report,
    suggest: Callable[[str], str | None],
) -> ForeignComponent | None:
    try:
        specs, is_open = signature_specs(target)
    except ValueError:  # some builtins and extension classes have no signature: their constructor judges the fields
        specs, is_open = [], True
    values = check_node(fields, specs, path, report, is_open=is_open, suggest=suggest)
    return None if values is None else ForeignComponent(name, values)


def _import_longest(parts: list[str], target: str, path: str) -> tuple[Any, int]:
    """The module named by the longest importable prefix, and how many parts it took."""
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        try:
            return importlib.import_module(module), count
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
                raise _target_fault(
                    path,
                    target,
                    f"importing {module} needs the module {error.name!r}, which is not installed",
                    f"install {error.name}, or add the folder that holds it to run.import_paths",
                ) from error
        except Exception as error:
            raise _target_fault(
                path,
                target,
                f"importing {module} failed: {type(error).__name__}: {error}",
                f"make `python -c 'import {module}'` work first",
            ) from error
    raise _target_fault(
        path,
        target,
        f"no module named {parts[0]!r} can be imported",
        f"install it, or add the folder that holds {parts[0]}/ to run.import_paths",
    )


def _target_fault(path: str, target: str, rule: str, fix: str) -> InvalidConfigError:
    return InvalidConfigError([Violation(path, target, rule, fix)])


def _file_of(owner: object) -> str:
    return getattr(owner, "__file__", None) or getattr(owner, "__name__", None) or repr(owner)
