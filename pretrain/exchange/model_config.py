"""Model configurations of both sides: reading a ``config.json``, and writing one where that is possible. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config.check import plain
from pretrain.config.components import TARGET, check_component
from pretrain.config.typecheck import Report, check_value
from pretrain.exchange.architecture import Architecture, ExchangeError, Settings, Tree
from pretrain.exchange.keys import FIXED, HARMLESS, PLAIN_WEIGHTS, decoded, spelled_once
from pretrain.exchange.registry import ARCHITECTURES, architecture_of
from pretrain.models.hybrid.config import MIXERS, HybridConfig

HYBRID = "pretrain.models.hybrid.config.HybridConfig"

_TRAINING_ONLY = frozenset(
    {"layer_ratios", "max_sequence_length", "init_std", "mamba1.chunk_size", "moe.balance_loss", "moe.z_loss"}
)
"""Fields of ours on which no logit depends."""

_LLAMA3_ONLY = frozenset(
    f"attention.rope_scaling.{name}"
    for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
)


@dataclass(frozen=True)
class ImportedConfig:
    """What a ``config.json`` describes: the architecture, our configuration, its fields as a tree, remarks."""

    architecture: Architecture
    model: HybridConfig
    tree: Tree
    notes: tuple[str, ...]


def import_config(values: Mapping[str, Any]) -> ImportedConfig:
    """Our configuration for a ``config.json``.

    Raises:
        ExchangeError: another architecture, or every setting that this platform does not compute.
    """
    architecture = architecture_of(values)
    written, faults = spelled_once(decoded(values), architecture.aliases, architecture.defaults)
    settings = Settings(written, architecture.defaults, architecture.class_name, faults)
    for key in sorted(FIXED.keys() & (written.keys() - architecture.defaults.keys())):
        settings.only(key, *FIXED[key])
    tree = architecture.read(settings)
    for key in PLAIN_WEIGHTS:
        if key in values:
            settings.faults.append(f"config.json: {key}: weights must be plain; use the model before quantization")
    report = Report()
    model = None
    if not settings.faults:
        model = check_component({TARGET: HYBRID, **tree}, "model", report)
    found = [*settings.faults, *(f"{v.path} = {v.found!r}: {v.rule}" for v in report.violations)]
    if found or model is None:
        raise ExchangeError(_listed(f"{architecture.class_name} with these settings cannot be imported", found))
    unknown = sorted(written.keys() - architecture.defaults.keys() - FIXED.keys() - HARMLESS)
    if unknown:
        settings.notes.append(f"keys of config.json that {architecture.class_name} does not know: {', '.join(unknown)}")
    for key in ("attention_dropout", "hidden_dropout"):
        if values.get(key):
            settings.notes.append(
                f"{key} = {values[key]}: there is no dropout here; it changes training, not the model"
            )
    return ImportedConfig(architecture, model, tree, tuple(settings.notes))


def export_config(config: HybridConfig, wanted: str = "auto") -> tuple[Architecture, Tree]:
    """The architecture that computes what ``config`` computes, and the settings for its ``config.json``.

    ``wanted`` is a ``model_type``, or ``auto`` for the first that fits.

    Raises:
        ExchangeError: with every reason why the model is not of the wanted architecture, or of any.
    """
    candidates = list(ARCHITECTURES.values()) if wanted == "auto" else [ARCHITECTURES[wanted]]
    reasons: list[str] = []
    for architecture in candidates:
        values = architecture.write(config)
        found = _differences(config, architecture, values)
        if not found:
            # Keys that no release of the class computes from are left to its defaults.
            head = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
            return architecture, {**head, **values}
        reasons += [_listed(f"no {architecture.class_name} ({architecture.model_type})", found)]
    raise ExchangeError("This model cannot be exported:\n" + "\n".join(reasons))


def export_notes(config: HybridConfig, architecture: Architecture) -> list[str]:
    """What a user should know of a model that is written as ``architecture``."""
    notes = []
    if config.tied_embeddings and not architecture.ties:
        notes.append(f"{architecture.class_name} cannot tie its head: the embedding is written twice")
    if config.residual_fp32 and "residual_in_fp32" not in architecture.defaults:
        notes.append(f"residual_fp32: {architecture.class_name} adds in the parameters' dtype; the same in fp32")
    return notes


def effective(config: HybridConfig) -> dict[str, Any]:
    """What a configuration computes, as values by dotted field: defaults filled in, unused mixers left out."""
    width, pattern = config.width, config.layer_pattern
    tree = plain(config)
    used = {field for symbol, field in MIXERS.items() if symbol in pattern}
    unused = set(MIXERS.values()) - used
    values = _flat({name: value for name, value in tree.items() if name not in unused}, "")
    values["pattern"] = pattern
    if "attention" in used:
        attention = config.attention
        windows = [window for window in attention.windows if window is not None]
        values |= {
            "attention.num_kv_heads": attention.kv_heads,
            "attention.head_dim": attention.features(width),
            "attention.windows": attention.windows if windows else [],
            "attention.clip_zeta": None if attention.clip_gamma is None else attention.clip_zeta,
            "attention.rope_fraction": 1.0 if attention.rope_theta is None else attention.rope_fraction,
        }
        if attention.rope_scaling is not None and attention.rope_scaling.kind == "linear":
            values = {path: value for path, value in values.items() if path not in _LLAMA3_ONLY}
    if "mamba2" in used:
        values |= {"mamba2.num_heads": config.mamba2.heads(width), "mamba2.norm_groups": config.mamba2.normed_groups}
        values.pop("mamba2.expand")
    if "mamba1" in used and config.mamba1.dt_rank is None:
        values["mamba1.dt_rank"] = -(-width // 16)
    for name in {"mlp", "moe"} & used:
        values[f"{name}.hidden_size"] = getattr(config, name).hidden(width)
        values.pop(f"{name}.ratio")
    return {path: _comparable(value) for path, value in values.items() if path not in _TRAINING_ONLY}


def _differences(config: HybridConfig, architecture: Architecture, values: Mapping[str, Any]) -> list[str]:
    """Every field in which what was written reads differently from ``config``."""
    settings = Settings(values, architecture.defaults, architecture.class_name)
    # Types only: whether the model is a sound one was asked before, and must not hide what differs.
    reread = check_value(architecture.read(settings), HybridConfig, "model", Report())
    assert isinstance(reread, HybridConfig), f"{architecture.model_type}: {values}"
    ours, theirs = effective(config), effective(reread)
    ignored = set() if architecture.ties else {"tied_embeddings"}
    ignored |= set() if "residual_in_fp32" in architecture.defaults else {"residual_fp32"}
    if ours["pattern"] != theirs["pattern"]:
        # Options of mixers that the architecture has not would only repeat this.
        ignored |= {path for path in ours if "." in path and path not in theirs}
    reasons = [
        f"{path} = {ours[path]!r}, in {architecture.class_name}: {theirs.get(path)!r}"
        for path in ours
        if path not in ignored and ours[path] != theirs.get(path)
    ]
    return reasons or settings.faults


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= _flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def _comparable(value: Any) -> Any:
    """Numbers by value and sequences as lists, whatever their type."""
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _listed(head: str, lines: list[str]) -> str:
    return head + ":\n" + "\n".join(f"  {line}" for line in lines)
