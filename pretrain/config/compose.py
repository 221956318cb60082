"""Composing the configuration tree from config files and command-line overrides, with Hydra's compose API.

Hydra chooses and merges the files; values are set afterwards on the untyped tree, because Hydra refuses the
first unknown key it meets and we want all faults at once. What cannot be composed is reported, its place is
marked missing, and the rest goes on to the check. Hydra is imported when a function runs: importing this
module is cheap.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pretrain.config.check import check, complete_tree
from pretrain.config.components import COMPONENT_FIELDS, TARGET, add_import_paths, path_fields
from pretrain.config.schema import Config
from pretrain.config.typecheck import MISSING_VALUE, TAG, dataclass_specs, tagged_members
from pretrain.config.violation import InvalidConfigError, Violation, did_you_mean

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

PATH_FIELDS: Final = ("run.root", "run.import_paths", "train.init_from", "tracking.store", "launcher.template")
"""Fields of the schema that hold file paths; components declare theirs in ``path_fields``."""

PRIMARY: Final = "config"
COMPOSED_FILES: Final = "config files"


@dataclass(frozen=True)
class Composition:
    """A composed plain tree and the faults met on the way; the place of each fault is marked ``???``."""

    tree: dict[str, Any]
    violations: tuple[Violation, ...]


def load_run_config(
    overrides: Sequence[str], config_dir: str | None = None, cwd: str | None = None
) -> tuple[dict[str, Any], Config]:
    """Compose, make paths absolute and check: the complete plain tree and the typed configuration.

    Raises :class:`InvalidConfigError` with the faults of composition and check together.
    """
    composition = compose_leniently(overrides, config_dir)
    cwd = cwd or os.getcwd()
    tree = resolve_paths(composition.tree, cwd)
    config = check(tree, composition.violations)
    complete = resolve_paths(complete_tree(tree, config), cwd)  # defaults hold relative paths too
    return complete, check(complete)


def compose(overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The composed, resolved and still unchecked tree.

    ``overrides`` follow Hydra's grammar: ``group=option``, ``key.path=value``, ``+key.path=value``,
    ``~key.path``. ``config_dir`` is a folder of the user's with the same groups as the shipped one; its
    files come first. Raises :class:`InvalidConfigError` for overrides or files that cannot be composed.
    """
    composition = compose_leniently(overrides, config_dir)
    if composition.violations:
        raise InvalidConfigError(composition.violations)
    return composition.tree


def compose_leniently(overrides: Sequence[str], config_dir: str | None = None) -> Composition:
    """Like :func:`compose`, but goes on after faults that leave the rest of the tree meaningful.

    Raises :class:`InvalidConfigError` when nothing meaningful is left: a missing ``config_dir``, an unknown
    experiment, or files that do not compose.
    """
    from omegaconf import OmegaConf

    folders = _config_folders(config_dir)
    violations: list[Violation] = []
    unusable: list[str] = []
    choices: list[str] = []
    settings: list[Override] = []
    for text in overrides:
        try:
            override = parse_override(text)
        except InvalidConfigError as error:
            violations.extend(error.violations)
            unusable.append(error.violations[0].path)
            continue
        if not _is_choice(override, folders):
            settings.append(override)
        elif (fault := _choice_fault(override, folders)) is None:
            choices.append(text)
        else:
            violations.append(fault)
            unusable.append(fault.path)
    if "experiment" in unusable:
        raise InvalidConfigError(violations)
    cfg = _compose_files(choices, folders, violations)
    OmegaConf.set_struct(cfg, False)
    for override in settings:
        if (fault := _apply(override, cfg)) is not None:
            violations.append(fault)
            unusable.append(fault.path)
    for path in unusable:
        _mark_missing(cfg, path)
    tree = _resolve(cfg, "", violations)
    return Composition(tree, tuple(violations))


def parse_override(text: str) -> Override:
    """Parse one override. Raises :class:`InvalidConfigError` for bad syntax and for sweeps."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    path = text.partition("=")[0].lstrip("+~") or text
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise InvalidConfigError(
            [
                Violation(
                    path,
                    text,
                    f"an override in Hydra's grammar; {_first_line(error)}",
                    "write key.path=value, and quote values with special characters: 'key=\"a, b\"'",
                )
            ]
        ) from error
    if override.is_sweep_override():
        raise InvalidConfigError(
            [Violation(path, text, "one value for each key; a sweep is no run", "for a list write key=[a,b]")]
        )
    return override


def resolve_paths(tree: Mapping[str, Any], cwd: str) -> dict[str, Any]:
    """A copy of ``tree`` in which relative file paths are absolute (from ``cwd``) and ``~`` is expanded.

    Values that are no text, and URLs, stay as they are. Folders in ``run.import_paths`` are put on
    ``sys.path``: the classes of components say which of their fields are paths.
    """
    resolved = deepcopy(dict(tree))
    for path in PATH_FIELDS:
        _resolve_field(resolved, path, cwd)
    run = resolved.get("run")
    import_paths = run.get("import_paths") if isinstance(run, dict) else None
    if isinstance(import_paths, list):
        add_import_paths(path for path in import_paths if isinstance(path, str))
    for name in COMPONENT_FIELDS:
        for field_name in path_fields(resolved.get(name)):
            _resolve_field(resolved, f"{name}.{field_name}", cwd)
    return resolved


def shipped_config_dir() -> Path:
    """The ``configs`` folder beside the ``pretrain`` package, in a checkout and in a wheel alike."""
    return Path(__file__).resolve().parents[2] / "configs"


def group_options(group: str, config_dir: str | None = None) -> list[str]:
    """The options of a config group, of the user's folder and the shipped one together, sorted."""
    return _options(group, _config_folders(config_dir))


def shipped_option(group: str, option: str) -> dict[str, Any]:
    """The values of a shipped file of a config group. Raises :class:`InvalidConfigError` for an unknown option."""
    import yaml

    options = group_options(group)
    if option not in options:
        raise InvalidConfigError([_unknown_option(group, option, option, options)])
    return dict(yaml.safe_load((shipped_config_dir() / group / f"{option}.yaml").read_text()))


def _config_folders(config_dir: str | None) -> list[Path]:
    shipped = shipped_config_dir()
    if config_dir is None:
        return [shipped]
    user = Path(config_dir).expanduser().absolute()
    if not user.is_dir():
        raise InvalidConfigError(
            [
                Violation(
                    "--config-dir",
                    config_dir,
                    "an existing folder of config files",
                    f"create {user}, or correct it",
                )
            ]
        )
    return [user, shipped]


def _options(group: str, folders: list[Path]) -> list[str]:
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _is_choice(override: Override, folders: list[Path]) -> bool:
    """Whether an override chooses a file of a group; ``model={...}``, for one, does not."""
    key = override.key_or_group
    if "/" in key or override.package is not None:
        return True
    is_group = bool(key) and "." not in key and any((folder / key).is_dir() for folder in folders)
    return is_group and not isinstance(override.value(), dict)


def _choice_fault(override: Override, folders: list[Path]) -> Violation | None:
    group, choice = override.key_or_group, override.value()
    options = _options(group, folders)
    if not options:
        known = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
        return Violation(group, override.input_line, "an existing config group", f"groups: {', '.join(known)}")
    chosen = choice if isinstance(choice, list) else [choice]
    wrong = [name for name in chosen if name is not None and name not in options and not override.is_delete()]
    if not wrong:
        return None
    return _unknown_option(group, choice, str(wrong[0]), options)


def _unknown_option(group: str, choice: object, wrong: str, options: list[str]) -> Violation:
    close = did_you_mean(wrong, options)
    hint = f"did you mean {group}={close}? " if close else ""
    return Violation(group, choice, f"an option of the config group {group!r}", f"{hint}options: {', '.join(options)}")


def _compose_files(choices: list[str], folders: list[Path], violations: list[Violation]) -> Any:
    """Let Hydra build the defaults list and merge the files. The first folder wins where both hold a file."""
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    *users, shipped = folders
    try:
        with initialize_config_dir(str(shipped), version_base="1.3", job_name="pretrain"):
            # A search path given as an override would be searched last, and could not replace a shipped file.
            loader = GlobalHydra.instance().config_loader()
            for folder in users:
                loader.get_search_path().prepend("user", f"file://{folder}", anchor="main")
            loader.repository.initialize_sources(loader.get_search_path())
            return hydra_compose(PRIMARY, overrides=choices)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        cause = error.__cause__ or error.__context__
        detail = str(error).strip() or f"{type(cause).__name__}: {cause}"
        searched = ", ".join(map(str, folders))
        fault = Violation(COMPOSED_FILES, choices, f"files that compose; Hydra says: {detail}", f"look in {searched}")
        raise InvalidConfigError([*violations, fault]) from error


def _apply(override: Override, cfg: Any) -> Violation | None:
    """Set or delete one value in the open tree."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key = override.key_or_group
    try:
        if not override.is_delete():
            value = override.value()
            # Fields of what it replaces would not fit another component, nor another engine.
            replaces = isinstance(value, dict) and (TARGET in value or _names_other_member(cfg, key, value))
            OmegaConf.update(cfg, key, value, merge=not replaces, force_add=True)
            return None
        parent_path, _, name = key.rpartition(".")
        parent = OmegaConf.select(cfg, parent_path) if parent_path else cfg
        if OmegaConf.is_dict(parent) and name in parent:
            del parent[name]
            return None
        return Violation(key, override.input_line, "'~' removes a key that is there", "leave this override out")
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        return Violation(
            key,
            override.input_line,
            f"a key that can be set; {_first_line(error)}",
            "set a field, with key.path=value",
        )


def _names_other_member(cfg: Any, key: str, value: dict[Any, Any]) -> bool:
    """Whether ``value`` at ``key`` chooses another class of the schema than the node there, by its tag."""
    from omegaconf import OmegaConf

    tagged = [spec.name for spec in dataclass_specs(Config) if tagged_members(spec.annotation)]
    return key in tagged and TAG in value and OmegaConf.select(cfg, f"{key}.{TAG}") != value[TAG]


def _mark_missing(cfg: Any, path: str) -> None:
    """Mark a value that an unusable override meant to replace; a key that is not there needs no mark."""
    from omegaconf import OmegaConf

    parent_path, _, name = path.rpartition(".")
    parent = OmegaConf.select(cfg, parent_path, default=None) if parent_path else cfg
    if OmegaConf.is_dict(parent) and name in parent:
        parent[name] = MISSING_VALUE


def _resolve(node: Any, path: str, violations: list[Violation]) -> Any:
    """A plain copy with interpolations resolved; those that cannot be are reported and marked missing."""
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    is_list = isinstance(node, ListConfig)
    keys: list[Any] = list(range(len(node))) if is_list else list(node.keys())
    items: list[Any] = []
    for key in keys:
        where = f"{path}[{key}]" if is_list else (f"{path}.{key}" if path else str(key))
        if OmegaConf.is_missing(node, key):
            items.append(MISSING_VALUE)
            continue
        try:
            value = node[key]
        except (OmegaConfBaseException, RecursionError) as error:
            raw = OmegaConf.to_container(node, resolve=False)
            assert isinstance(raw, dict | list)
            violations.append(
                Violation(
                    where,
                    raw[key],
                    f"an interpolation that resolves; {_first_line(error)}",
                    "correct the name in ${...}, set what it refers to, or write the value out",
                )
            )
            items.append(MISSING_VALUE)
            continue
        items.append(_resolve(value, where, violations) if isinstance(value, DictConfig | ListConfig) else value)
    return items if is_list else dict(zip(keys, items, strict=True))


def _resolve_field(tree: dict[str, Any], path: str, cwd: str) -> None:
    node: Any = tree
    *parents, name = path.split(".")
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or name not in node:
        return
    value = node[name]
    if isinstance(value, list):
        node[name] = [_absolute(item, cwd) for item in value]
    elif isinstance(value, dict):
        node[name] = {key: _absolute(item, cwd) for key, item in value.items()}
    else:
        node[name] = _absolute(value, cwd)


def _absolute(value: Any, cwd: str) -> Any:
    if not isinstance(value, str) or value in ("", MISSING_VALUE) or "://" in value:
        return value
    return os.path.normpath(os.path.join(cwd, os.path.expanduser(value)))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
