"""Mamba-2 (``Mamba2ForCausalLM``). Torch-free.

Both pack the input projection as z, x, B, C, dt and the convolved channels as x, B, C. Their gated norm works on each
of ``n_groups`` parts of the features, as ours does by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pretrain.exchange.architecture import Architecture, Link, Settings, Tree, link, step_limit
from pretrain.exchange.state_space import mixer_options, read_model, write_model
from pretrain.models.hybrid.config import HybridConfig

_DEFAULTS: dict[str, Any] = {
    "num_heads": 128,
    "head_dim": 64,
    "vocab_size": 32768,
    "hidden_size": 4096,
    "state_size": 128,
    "layer_types": None,
    "num_hidden_layers": 64,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "residual_in_fp32": True,
    "time_step_rank": "auto",
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "time_step_limit": [0.0, math.inf],
    "rescale_prenorm_residual": False,
    "chunk_size": 256,
    "tie_word_embeddings": False,
    # In old files; the class gates first and normalises with RMSNorm whatever they say.
    "norm_before_gate": True,
    "rms_norm": True,
}


def _read(settings: Settings) -> Tree:
    width, expand = settings.whole("hidden_size"), settings.whole("expand")
    head_dim, heads = settings.whole("head_dim"), settings.whole("num_heads")
    if not settings.faults and heads * head_dim != expand * width:
        settings.fault("num_heads", f"expand * hidden_size / head_dim = {expand * width / head_dim:g}")
    if (limit := step_limit(settings)) is not None:
        settings.notes.append(
            f"time_step_limit = [{limit[0]:g}, {limit[1]:g}] limits the steps here always, in {settings.class_name} "
            "of transformers not while it decodes from its cache"
        )
    return read_model(settings, "M") | {
        "mamba2": {
            "expand": expand,
            "head_dim": head_dim,
            "state_dim": settings.whole("state_size"),
            "groups": settings.whole("n_groups"),
            "conv_kernel": settings.whole("conv_kernel"),
            "chunk_size": settings.whole("chunk_size"),
            **mixer_options(settings, "use_bias", limit),
        },
    }


def _write(config: HybridConfig) -> Tree:
    mixer = config.mamba2
    values = write_model(config, mixer) | {
        "num_heads": mixer.heads(config.width),
        "head_dim": mixer.head_dim,
        "n_groups": mixer.groups,
        "chunk_size": mixer.chunk_size,
    }
    if mixer.dt_limit is not None:
        values["time_step_limit"] = list(mixer.dt_limit)
    return values


def mixer_links(theirs: str, ours: str, proj_bias: bool, conv_bias: bool) -> Iterator[Link]:
    """The tensors of one mixer."""
    for part in ("weight", "bias") if proj_bias else ("weight",):
        yield link(
            f"{theirs}.in_proj.{part}", *(f"{ours}.in_proj.{name}.{part}" for name in ("z", "x", "B", "C", "dt"))
        )
        yield link(f"{theirs}.out_proj.{part}", f"{ours}.out_proj.{part}")
    convolved = ("x", "B", "C")
    yield link(f"{theirs}.conv1d.weight", *(f"{ours}.conv.{name}.weight" for name in convolved), kind="convolution")
    if conv_bias:
        yield link(f"{theirs}.conv1d.bias", *(f"{ours}.conv.{name}.bias" for name in convolved))
    for name in ("A_log", "D", "dt_bias", "norm.weight"):
        yield link(f"{theirs}.{name}", f"{ours}.{name}")


def _links(config: HybridConfig) -> Iterator[Link]:
    for layer in range(config.num_layers):
        yield link(f"backbone.layers.{layer}.norm.weight", f"layers.{layer}.norm.weight")
        mixer = config.mamba2
        yield from mixer_links(
            f"backbone.layers.{layer}.mixer", f"layers.{layer}.mixer", mixer.proj_bias, mixer.conv_bias
        )
    yield link("backbone.norm_f.weight", "final_norm.weight")


MAMBA2 = Architecture(
    model_type="mamba2",
    class_name="Mamba2ForCausalLM",
    defaults=_DEFAULTS,
    neutral=frozenset(
        {
            "time_step_rank",
            "time_step_min",
            "time_step_max",
            "time_step_floor",
            "rescale_prenorm_residual",
            "norm_before_gate",
            "rms_norm",
        }
    ),
    read=_read,
    write=_write,
    links=_links,
    embedding="backbone.embeddings.weight",
)
