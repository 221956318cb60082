"""Mamba-1 (``MambaForCausalLM``). Torch-free.

Both pack the input projection as x (convolved), z (gate), and ``x_proj`` as dt, B, C. Their bias of ``dt_proj`` is our
``dt_bias``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pretrain.exchange.architecture import Architecture, Link, Settings, Tree, link
from pretrain.exchange.state_space import mixer_options, read_model, write_model
from pretrain.models.hybrid.config import HybridConfig

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "state_size": 16,
    "layer_types": None,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "intermediate_size": None,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "residual_in_fp32": True,
    "time_step_rank": "auto",
    "time_step_scale": 1.0,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_init_scheme": "random",
    "time_step_floor": 1e-4,
    "rescale_prenorm_residual": False,
    "use_mambapy": False,
    "use_associative_scan": True,
    "tie_word_embeddings": True,
}


def _read(settings: Settings) -> Tree:
    width, expand = settings.whole("hidden_size"), settings.whole("expand")
    # Written by the class itself, which computes it from the other two.
    settings.only("intermediate_size", None, expand * width)
    rank = math.ceil(width / 16) if settings["time_step_rank"] == "auto" else settings.whole("time_step_rank")
    return read_model(settings, "m") | {
        "mamba1": {
            "expand": expand,
            "state_dim": settings.whole("state_size"),
            "conv_kernel": settings.whole("conv_kernel"),
            "dt_rank": rank,
            **mixer_options(settings, "use_bias", None),
        },
    }


def _write(config: HybridConfig) -> Tree:
    mixer = config.mamba1
    return write_model(config, mixer) | {
        "intermediate_size": mixer.expand * config.width,
        "time_step_rank": math.ceil(config.width / 16) if mixer.dt_rank is None else mixer.dt_rank,
    }


def _links(config: HybridConfig) -> Iterator[Link]:
    mixer = config.mamba1
    for layer in range(config.num_layers):
        theirs, ours = f"backbone.layers.{layer}.mixer", f"layers.{layer}.mixer"
        yield link(f"backbone.layers.{layer}.norm.weight", f"layers.{layer}.norm.weight")
        for part in ("weight", "bias") if mixer.proj_bias else ("weight",):
            yield link(f"{theirs}.in_proj.{part}", f"{ours}.in_proj.x.{part}", f"{ours}.in_proj.z.{part}")
            yield link(f"{theirs}.out_proj.{part}", f"{ours}.out_proj.{part}")
        yield link(f"{theirs}.conv1d.weight", f"{ours}.conv.weight", kind="convolution")
        if mixer.conv_bias:
            yield link(f"{theirs}.conv1d.bias", f"{ours}.conv.bias")
        yield link(f"{theirs}.dt_proj.bias", f"{ours}.dt_bias")
        yield link(f"{theirs}.x_proj.weight", *(f"{ours}.x_proj.{part}.weight" for part in ("dt", "B", "C")))
        for name in ("dt_proj.weight", "A_log", "D"):
            yield link(f"{theirs}.{name}", f"{ours}.{name}")
    yield link("backbone.norm_f.weight", "final_norm.weight")


MAMBA = Architecture(
    model_type="mamba",
    class_name="MambaForCausalLM",
    defaults=_DEFAULTS,
    neutral=frozenset(
        {
            "time_step_scale",
            "time_step_min",
            "time_step_max",
            "time_step_init_scheme",
            "time_step_floor",
            "rescale_prenorm_residual",
            "use_mambapy",
            "use_associative_scan",
        }
    ),
    read=_read,
    write=_write,
    links=_links,
    embedding="backbone.embeddings.weight",
)
