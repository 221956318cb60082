"""Llama (``LlamaForCausalLM``): attention with rotary embedding and a gated MLP in turn. Torch-free.

Their layer i is our layers 2i (attention) and 2i + 1 (MLP); each of ours brings its norm. The rotary embedding turns
feature j with feature j + P/2 in both, so that projections are copied as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pretrain.exchange.architecture import Architecture, Link, Settings, Tree, as_number, link
from pretrain.models.hybrid.config import HybridConfig

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "layer_types": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}
_ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ORIGINAL = "original_max_position_embeddings"


def _read(settings: Settings) -> Tree:
    settings.only("hidden_act", "silu", "swish")
    settings.only_layers("full_attention")
    heads = settings.whole("num_attention_heads")
    attention: Tree = {"num_heads": heads}
    if settings["num_key_value_heads"] is not None:
        attention["num_kv_heads"] = settings.whole("num_key_value_heads")
    if settings["head_dim"] is not None:
        attention["head_dim"] = settings.whole("head_dim")
    if settings.flag("attention_bias"):
        attention |= {"qkv_bias": True, "out_bias": True}
    attention |= _read_rope(settings)
    mlp: Tree = {"hidden_size": settings.whole("intermediate_size"), "activation": "swiglu"}
    if settings.flag("mlp_bias"):
        mlp["bias"] = True
    return {
        "pattern": "*-" * settings.layers(),
        "width": settings.whole("hidden_size"),
        "vocab_size": settings.whole("vocab_size"),
        "max_sequence_length": settings.whole("max_position_embeddings"),
        "attention": attention,
        "mlp": mlp,
        "norm": {"eps": settings.number("rms_norm_eps")},
        "tied_embeddings": settings.flag("tie_word_embeddings"),
        "init_std": settings.number("initializer_range"),
    }


def _read_rope(settings: Settings) -> Tree:
    """``rope_parameters`` as transformers 5 writes them, or ``rope_theta`` and ``rope_scaling`` of older files.

    Which of them counts depends on the release, so that all that are given must say the same.
    """
    top = {"rope_theta": settings["rope_theta"]}
    if settings["partial_rotary_factor"] is not None:
        top["partial_rotary_factor"] = settings["partial_rotary_factor"]
    given = {key: rope for key in ("rope_scaling", "rope_parameters") if (rope := _rope_of(settings, key, top))}
    rope, *others = given.values() or [top | {"rope_type": "default"}]
    if any(other != rope for other in others):
        shown = " and ".join(f"{key} = {settings[key]!r}" for key in given)
        settings.faults.append(f"config.json: {shown} differ, expected one of them, or both the same; remove one")
    if "rope_theta" in settings.values and rope["rope_theta"] != settings["rope_theta"]:
        settings.fault("rope_theta", f"{rope['rope_theta']!r} as in {' and '.join(given)}; remove one")
    theta = _positive(settings, "rope_theta", rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found = rope["partial_rotary_factor"]
        settings.faults.append(f"config.json: partial_rotary_factor = {found!r}, expected 1.0 in {settings.class_name}")
    kind = rope["rope_type"]
    if kind == "default":
        return {"rope_theta": theta}
    if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
        known = ", ".join(["default", *_ROPE_NUMBERS])
        settings.faults.append(f"config.json: rope_type = {kind!r}, expected one of {known}")
        return {"rope_theta": theta}
    if kind == "llama3":
        rope[_ORIGINAL] = _original_length(settings, rope.get(_ORIGINAL))
    scaling: Tree = {"kind": kind}
    for name in _ROPE_NUMBERS[kind]:
        value = _positive(settings, f"{name} of rope_type {kind}", rope.get(name))
        scaling[name] = int(value) if name == _ORIGINAL else value
        if scaling[name] != value:
            settings.faults.append(f"config.json: {name} = {value!r}, expected a whole number")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _rope_of(settings: Settings, key: str, top: Tree) -> Tree:
    """The settings of the embedding under ``key``, completed as the class does it; empty where there are none."""
    found = settings[key]
    if found is None or found == {}:
        return {}
    if not isinstance(found, dict):
        settings.fault(key, "an object, or null")
        return {}
    # A dictionary for each kind of layers, which the class knows of as well.
    if any(isinstance(value, dict) for value in found.values()):
        settings.fault(key, f"one embedding for all layers: {settings.class_name} has no other")
        return {}
    named = {name: value for name, value in found.items() if name != "type"}
    return {**top, "rope_type": found.get("type", "default"), **named}


def _original_length(settings: Settings, inside: Any) -> Any:
    """Length before the scaling of llama3: the class prefers the one beside the other settings of the embedding."""
    beside = settings[_ORIGINAL]
    if beside is None:
        return settings["max_position_embeddings"] if inside is None else inside
    if inside is not None and inside != beside:
        settings.fault(_ORIGINAL, f"{inside!r} as in the settings of the embedding; remove one")
    return beside


def _positive(settings: Settings, name: str, found: Any) -> float:
    """A finite number above 0; a fault, and 1 in its place, for anything else."""
    value = as_number(found)
    if value is not None and 0 < value < math.inf:
        return value
    settings.faults.append(f"config.json: {name} = {found!r}, expected a finite number above 0")
    return 1.0


def _write(config: HybridConfig) -> Tree:
    attention, mlp = config.attention, config.mlp
    values: Tree = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": mlp.hidden(config.width),
        "num_hidden_layers": max(1, config.num_layers // 2),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.features(config.width),
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length or 2048,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": attention.qkv_bias,
        "attention_dropout": 0.0,
        "mlp_bias": mlp.bias,
    }
    theta = 10000.0 if attention.rope_theta is None else float(attention.rope_theta)
    rope: Tree = {"rope_type": "default"}
    if (scaling := attention.rope_scaling) is not None:
        rope = {"rope_type": scaling.kind}
        rope |= {name: getattr(scaling, name) for name in _ROPE_NUMBERS[scaling.kind]}
    # Both spellings: transformers before version 5 reads the first two only.
    values["rope_theta"] = theta
    values["rope_scaling"] = None if rope["rope_type"] == "default" else dict(rope)
    values["rope_parameters"] = {"rope_theta": theta, **rope}
    return values


def _links(config: HybridConfig) -> Iterator[Link]:
    biased, wide = config.attention.qkv_bias, config.mlp.bias
    for layer in range(config.num_layers // 2):
        theirs, first, second = f"model.layers.{layer}", f"layers.{2 * layer}", f"layers.{2 * layer + 1}"
        yield link(f"{theirs}.input_layernorm.weight", f"{first}.norm.weight")
        yield link(f"{theirs}.post_attention_layernorm.weight", f"{second}.norm.weight")
        for part in ("weight", "bias") if biased else ("weight",):
            for name in "qkv":
                yield link(f"{theirs}.self_attn.{name}_proj.{part}", f"{first}.mixer.qkv.{name}.{part}")
            yield link(f"{theirs}.self_attn.o_proj.{part}", f"{first}.mixer.out_proj.{part}")
        for part in ("weight", "bias") if wide else ("weight",):
            for name in ("gate", "up"):
                yield link(f"{theirs}.mlp.{name}_proj.{part}", f"{second}.mixer.in_proj.{name}.{part}")
            yield link(f"{theirs}.mlp.down_proj.{part}", f"{second}.mixer.out_proj.{part}")
    yield link("model.norm.weight", "final_norm.weight")


LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    defaults=_DEFAULTS,
    neutral=frozenset({"attention_dropout", "pretraining_tp"}),
    read=_read,
    write=_write,
    links=_links,
    embedding="model.embed_tokens.weight",
    # Frequencies follow from the settings; files of old releases hold them.
    absent=lambda name: name.endswith("rotary_emb.inv_freq"),
)
