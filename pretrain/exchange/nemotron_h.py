"""Nemotron-H (``NemotronHForCausalLM``): a pattern of Mamba-2, attention without position embedding, MLP and MoE
layers, one mixer and one norm each, as our model (arXiv 2504.03624). Torch-free.

The class of ``transformers`` 5 limits the step sizes of Mamba-2 layers from below by ``time_step_min``, in whole
sequences (not when it decodes token by token), and reads no ``time_step_limit``. That is what is read here. A model
without such a limit is written with :data:`NO_LIMIT`, below which no step of the softplus lies in practice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pretrain.exchange.architecture import Architecture, Link, Settings, Tree, link, step_limit
from pretrain.exchange.keys import current_names
from pretrain.exchange.mamba2 import mixer_links
from pretrain.exchange.state_space import mixer_options
from pretrain.models.hybrid.config import HybridConfig

NO_LIMIT = 1e-30
"""Positive, because the class takes its logarithm when it draws initial weights."""

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "layers_block_type": None,
    "hybrid_override_pattern": None,
    "num_hidden_layers": None,
    "tie_word_embeddings": False,
    "num_logits_to_keep": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "sliding_window": None,
    "intermediate_size": 21504,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "use_mamba_kernels": True,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "n_groups": 8,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_limit": [0.0, math.inf],
    "time_step_floor": 1e-4,
    "use_conv_bias": True,
    "chunk_size": 128,
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None,
    "moe_shared_expert_overlap": True,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "mtp_layers_block_type": None,
    "mtp_hybrid_override_pattern": None,
    "use_bias": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
}
_NEUTRAL = frozenset(
    {
        "num_logits_to_keep",
        "attention_dropout",
        "hidden_dropout",
        "use_mamba_kernels",
        "expand",
        "time_step_max",
        "time_step_floor",
        "mamba_proj_bias",
        "mamba_ssm_cache_dtype",
        "n_shared_experts",
        "moe_shared_expert_overlap",
        "mtp_layers_block_type",
        "mtp_hybrid_override_pattern",
        "rescale_prenorm_residual",
        "tie_word_embeddings",
    }
)
_ALIASES = {
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}
_TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_SYMBOLS = {kind: symbol for symbol, kind in _TYPES.items()}


def _read(settings: Settings) -> Tree:
    settings.only("mamba_hidden_act", "silu", "swish")
    settings.only("sliding_window", None)
    settings.only("num_nextn_predict_layers", 0)
    pattern, width = _read_pattern(settings), settings.whole("hidden_size")
    tree: Tree = {
        "pattern": pattern,
        "width": width,
        "vocab_size": settings.whole("vocab_size"),
        "max_sequence_length": settings.whole("max_position_embeddings"),
        "norm": {"eps": settings.number("layer_norm_epsilon")},
        "tied_embeddings": False,  # whatever the file says: the class has a head of its own
        "init_std": settings.number("initializer_range"),
        "residual_fp32": settings.flag("residual_in_fp32"),
    }
    if "M" in pattern:
        tree["mamba2"] = _read_mamba(settings)
    if "*" in pattern:
        tree["attention"] = {
            "num_heads": settings.whole("num_attention_heads"),
            "num_kv_heads": settings.whole("num_key_value_heads"),
            "head_dim": settings.whole("head_dim"),
        }
        settings.only("attention_bias", False)  # the class has no such bias, whatever the setting
    if "-" in pattern or "E" in pattern:
        settings.only("mlp_hidden_act", "relu2")
    if "-" in pattern:
        tree["mlp"] = {"hidden_size": settings.whole("intermediate_size"), "activation": "relu2"}
        if settings.flag("mlp_bias"):
            tree["mlp"]["bias"] = True
    if "E" in pattern:
        tree["moe"] = _read_moe(settings)
    return tree


def _read_pattern(settings: Settings) -> str:
    kinds, pattern = current_names(settings["layers_block_type"]), settings["hybrid_override_pattern"]
    if isinstance(kinds, list) and kinds and all(isinstance(kind, str) and kind in _SYMBOLS for kind in kinds):
        listed = "".join(_SYMBOLS[kind] for kind in kinds)
        if pattern is not None and pattern != listed:
            settings.fault("hybrid_override_pattern", f"{listed!r} as layers_block_type says; remove one")
        return listed
    if kinds is not None:
        settings.faults.append(
            f"config.json: layers_block_type = {kinds!r}, expected a list of {', '.join(_TYPES.values())}"
        )
        return "M"
    if isinstance(pattern, str) and pattern and set(pattern) <= set(_TYPES):
        return pattern
    settings.fault("hybrid_override_pattern", f"symbols {' '.join(_TYPES)}, or a list layers_block_type")
    return "M"


def _read_mamba(settings: Settings) -> Tree:
    head_dim, heads = settings.whole("mamba_head_dim"), settings.whole("mamba_num_heads")
    lowest, limit = settings.number("time_step_min"), step_limit(settings)
    if limit is not None and limit != (lowest, math.inf):
        settings.fault(
            "time_step_limit", f"[0, Infinity], or [time_step_min, Infinity]: {settings.class_name} reads time_step_min"
        )
    if lowest > NO_LIMIT:
        settings.notes.append(
            f"time_step_min = {lowest:g} limits the steps of Mamba-2 layers, as in {settings.class_name}"
        )
    return {
        "num_heads": heads,
        "head_dim": head_dim,
        "state_dim": settings.whole("ssm_state_size"),
        "groups": settings.whole("n_groups"),
        "conv_kernel": settings.whole("conv_kernel"),
        "chunk_size": settings.whole("chunk_size"),
        **mixer_options(settings, "use_bias", (lowest, math.inf) if lowest > NO_LIMIT else None),
    }


def _read_moe(settings: Settings) -> Tree:
    settings.only("moe_latent_size", None)
    settings.only("n_group", 1)
    settings.only("topk_group", 1)
    if settings.flag("mlp_bias"):
        settings.fault("mlp_bias", "false with MoE layers, whose experts have no bias here")
    return {
        "num_experts": settings.whole("n_routed_experts"),
        "top_k": settings.whole("num_experts_per_tok"),
        "hidden_size": settings.whole("moe_intermediate_size"),
        "activation": "relu2",
        "shared_hidden_size": settings.whole("moe_shared_expert_intermediate_size"),
        "router": "sigmoid",
        "normalise_top_k": settings.flag("norm_topk_prob"),
        "routed_scale": settings.number("routed_scaling_factor"),
    }


def _write(config: HybridConfig) -> Tree:
    pattern, width = config.layer_pattern, config.width
    values: Tree = {
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "layers_block_type": [_TYPES.get(symbol, symbol) for symbol in pattern],
        "tie_word_embeddings": False,
        "max_position_embeddings": config.max_sequence_length or 4096,
        "initializer_range": config.init_std,
        "layer_norm_epsilon": config.norm.eps,
        "residual_in_fp32": config.residual_fp32,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "sliding_window": None,
        "num_nextn_predict_layers": 0,
    }
    if "M" in pattern:
        mixer = config.mamba2
        lowest, highest = mixer.dt_limit or (0.0, math.inf)
        values |= {
            "mamba_num_heads": mixer.heads(width),
            "mamba_head_dim": mixer.head_dim,
            "ssm_state_size": mixer.state_dim,
            "n_groups": mixer.groups,
            "conv_kernel": mixer.conv_kernel,
            "expand": mixer.expand,
            "chunk_size": mixer.chunk_size,
            "use_bias": mixer.proj_bias,
            "mamba_proj_bias": mixer.proj_bias,
            "use_conv_bias": mixer.conv_bias,
            "time_step_min": max(lowest, NO_LIMIT),
        }
        if mixer.dt_limit is not None:
            values["time_step_limit"] = [lowest, highest]
    if "*" in pattern:
        attention = config.attention
        values |= {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.features(width),
            "attention_bias": False,
        }
    values["mlp_bias"] = config.mlp.bias if "-" in pattern else False
    if "-" in pattern:
        values["intermediate_size"] = config.mlp.hidden(width)
    if "E" in pattern:
        moe = config.moe
        values |= {
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.hidden(width),
            "moe_shared_expert_intermediate_size": moe.shared_hidden_size,
            "n_shared_experts": 1,
            "norm_topk_prob": moe.normalise_top_k,
            "routed_scaling_factor": moe.routed_scale,
            "n_group": 1,
            "topk_group": 1,
            "moe_latent_size": None,
        }
    return values


def _links(config: HybridConfig) -> Iterator[Link]:
    for layer, symbol in enumerate(config.layer_pattern):
        theirs, ours = f"backbone.layers.{layer}.mixer", f"layers.{layer}.mixer"
        yield link(f"backbone.layers.{layer}.norm.weight", f"layers.{layer}.norm.weight")
        if symbol == "M":
            yield from mixer_links(theirs, ours, config.mamba2.proj_bias, config.mamba2.conv_bias)
        elif symbol == "*":
            for name in "qkv":
                yield link(f"{theirs}.{name}_proj.weight", f"{ours}.qkv.{name}.weight")
            yield link(f"{theirs}.o_proj.weight", f"{ours}.out_proj.weight")
        elif symbol == "-":
            for part in ("weight", "bias") if config.mlp.bias else ("weight",):
                yield link(f"{theirs}.up_proj.{part}", f"{ours}.in_proj.{part}")
                yield link(f"{theirs}.down_proj.{part}", f"{ours}.out_proj.{part}")
        else:
            yield from _moe_links(theirs, ours, config.moe.num_experts)
    yield link("backbone.norm_f.weight", "final_norm.weight")


def _moe_links(theirs: str, ours: str, num_experts: int) -> Iterator[Link]:
    yield link(f"{theirs}.gate.weight", f"{ours}.router.weight")
    for name in ("up", "down"):
        each = tuple(f"{theirs}.experts.{expert}.{name}_proj.weight" for expert in range(num_experts))
        yield Link(each, (f"{ours}.{name}.weight",), "stack")
    yield link(f"{theirs}.shared_experts.up_proj.weight", f"{ours}.shared.in_proj.weight")
    yield link(f"{theirs}.shared_experts.down_proj.weight", f"{ours}.shared.out_proj.weight")


def _zeros(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    """The bias by which a router without balancing loss is kept in balance (arXiv 2408.15664)."""
    layers = [layer for layer, symbol in enumerate(config.layer_pattern) if symbol == "E"]
    name = "backbone.layers.{}.mixer.gate.e_score_correction_bias"
    return {name.format(layer): (config.moe.num_experts,) for layer in layers}


NEMOTRON_H = Architecture(
    model_type="nemotron_h",
    class_name="NemotronHForCausalLM",
    defaults=_DEFAULTS,
    neutral=_NEUTRAL,
    read=_read,
    write=_write,
    links=_links,
    embedding="backbone.embeddings.weight",
    ties=False,
    zeros=_zeros,
    # Published files say backbone, the class calls it model.
    prefixes=("backbone.", "model."),
    aliases=_ALIASES,
)
