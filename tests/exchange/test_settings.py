"""Settings in every spelling of ``transformers``: read as the class reads them, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.huggingface import (
    SIZES,
    largest_difference,
    load_imported,
    our_decoding,
    our_logits,
    their_decoding,
    their_logits,
    tiny,
    tokens,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pretrain.exchange.architecture import ExchangeError
from pretrain.exchange.import_model import import_folder
from pretrain.exchange.keys import FIXED, HARMLESS, PLAIN_WEIGHTS
from pretrain.exchange.model_config import import_config
from pretrain.exchange.registry import ARCHITECTURES

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
FREE = {"time_step_min": 1e-30}
REMOVED = "removed"


def edited(folder: Path, kind: str, base: dict[str, Any], edits: dict[str, Any]) -> Path:
    """A tiny model saved with ``base``, and its ``config.json`` changed."""
    tiny(kind, **base).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text()) | edits
    kept = {key: value for key, value in values.items() if value != REMOVED}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


READ: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rope_scaling alone": ("llama", {}, {"rope_scaling": LINEAR, "rope_theta": 77.0, "rope_parameters": REMOVED}),
    "rope_scaling replaces an equal rope_parameters": (
        "llama",
        {},
        {"rope_scaling": LINEAR, "rope_theta": 77.0, "rope_parameters": LINEAR | {"rope_theta": 77.0}},
    ),
    "rope_scaling is empty": ("llama", {}, {"rope_scaling": {}, "rope_parameters": LINEAR}),
    "original length beside": (
        "llama",
        {},
        {"rope_parameters": LLAMA3 | {"rope_theta": 300.0}, "original_max_position_embeddings": 16},
    ),
    "original length left out": ("llama", {}, {"rope_parameters": LLAMA3 | {"rope_theta": 300.0}}),
    "llama with kinds of layers": ("llama", {}, {"layer_types": ["attention", "full_attention"]}),
    "layer_types": (
        "nemotron_h",
        FREE,
        {
            "layer_types": ["mamba", "mlp", "attention", "linear_attention", "mlp"],
            "layers_block_type": REMOVED,
        },
    ),
    "mamba_dt_min": ("nemotron_h", FREE, {"mamba_dt_min": 0.3, "time_step_min": REMOVED}),
    "mamba_n_groups": ("nemotron_h", FREE, {"mamba_n_groups": 2, "n_groups": REMOVED}),
    "mamba_d_conv": ("nemotron_h", FREE | {"conv_kernel": 3}, {"mamba_d_conv": 3, "conv_kernel": REMOVED}),
    "mamba_conv_bias": (
        "nemotron_h",
        FREE | {"use_conv_bias": False},
        {"mamba_conv_bias": False, "use_conv_bias": REMOVED},
    ),
    "mamba_chunk_size": ("nemotron_h", FREE, {"mamba_chunk_size": 8, "chunk_size": REMOVED}),
    "num_local_experts": (
        "nemotron_h",
        FREE
        | {
            "layers_block_type": ["moe", "mlp"],
            "n_routed_experts": 5,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
        {"num_local_experts": 5, "n_routed_experts": REMOVED},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_spelling_is_read_as_the_class_reads_it(name: str, tmp_path: Path) -> None:
    kind, base, edits = READ[name]
    source = edited(tmp_path / "theirs", kind, base, edits)
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    import_folder(source, tmp_path / "ours")
    wanted = their_logits(theirs, tokens())
    assert largest_difference(our_logits(load_imported(tmp_path / "ours"), tokens()), wanted) < 1e-4


def test_these_spellings_change_the_model(tmp_path: Path) -> None:
    """So that the comparison above can fail: read as if left out, the logits would differ."""
    for name in ("rope_scaling alone", "original length beside", "mamba_dt_min"):
        kind, base, edits = READ[name]
        with_it = edited(tmp_path / name, kind, base, edits)
        key = {"rope_scaling alone": "rope_scaling", "mamba_dt_min": "mamba_dt_min"}.get(
            name, "original_max_position_embeddings"
        )
        without = edited(tmp_path / f"{name} without", kind, base, edits | {key: REMOVED})
        first, second = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (with_it, without))
        assert largest_difference(their_logits(first, tokens()), their_logits(second, tokens())) > 1e-3, name


def test_every_key_that_a_class_looks_up_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a model, a whole sequence, cached steps: all that is read of the configuration."""
    looked_up: set[str] = set()
    original = PreTrainedConfig.__getattribute__

    def spy(config: PreTrainedConfig, key: str) -> Any:
        looked_up.add(key)
        return original(config, key)

    # Sizes or names for any kind of model, which these classes do not compute from; hooks of the class itself.
    generic = {"head_dim", "num_heads", "max_position_embeddings", "rope_parameters", "rope_theta", "layer_types"}
    hooks = {"is_heterogeneous", "ignore_keys_at_rope_validation", "sub_configs", "sub_configs_defaults"}
    other = {"mtp_layer_types", "mlp_layer_types"}  # validated, for classes that have them
    other |= {"vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy"}
    for kind in SIZES:
        looked_up.clear()
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedConfig, "__getattribute__", spy)
            model = tiny(kind)
            their_logits(model, tokens(1, 12))
            their_decoding(model, tokens(1, 12), 8)
        architecture = ARCHITECTURES[kind]
        known = architecture.defaults.keys() | architecture.aliases.keys() | FIXED.keys() | HARMLESS
        methods = {key for key in looked_up if callable(getattr(type(model.config), key, None))}
        private = {key for key in looked_up if key.startswith("_")}
        assert "hidden_size" in looked_up
        assert looked_up - known - methods - private - generic - hooks - other - {*PLAIN_WEIGHTS} == set(), kind


PATTERN = {"hybrid_override_pattern": "M-"}
REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "llama",
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 2.0}},
        ["rope_scaling = ", "rope_parameters = ", "differ"],
    ),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, ["rope_scaling = ", "differ"]),
    ("llama", {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, ["rope_theta = 5.0, expected 6.0"]),
    (
        "llama",
        {
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16},
            "original_max_position_embeddings": 32,
        },
        ["original_max_position_embeddings = 32, expected 16"],
    ),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, ["rope_parameters", "one embedding"]),
    ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
    ("llama", {"sliding_window": 8}, ["sliding_window = 8"]),
    ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types"]),
    ("llama", {"attention_chunk_size": 8}, ["attention_chunk_size = 8"]),
    ("llama", {"per_layer_config": {"0": {"sliding_window": 8}}}, ["per_layer_config"]),
    ("llama", {"text_config": {"hidden_size": 8}}, ["text_config"]),
    ("llama", {"transformers_weights": "other.safetensors"}, ["transformers_weights"]),
    *((kind, {"is_causal": False, **PATTERN}, ["is_causal = False"]) for kind in SIZES),
    ("mamba2", {"layer_types": ["full_attention"]}, ["layer_types"]),
    ("nemotron_h", {**PATTERN, "mamba_dt_min": 0.3, "time_step_min": 0.1}, ["mamba_dt_min = 0.3", "two spellings"]),
    ("nemotron_h", {"layer_types": ["moe"], "layers_block_type": ["mlp"]}, ["layer_types = ['moe']"]),
    ("nemotron_h", {"layers_block_type": ["mlp"], **PATTERN}, ["hybrid_override_pattern = 'M-', expected '-'"]),
    # Malformed files.
    ("llama", {"rope_scaling": "x"}, ["rope_scaling = 'x'"]),
    ("llama", {"rope_parameters": [1]}, ["rope_parameters = [1]"]),
    ("llama", {"rope_scaling": {"rope_type": ["linear"]}}, ["rope_type = ['linear']"]),
    ("llama", {"rope_scaling": LINEAR | {"factor": math.nan}}, ["factor of rope_type linear = nan"]),
    (
        "llama",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16.5}},
        ["original_max_position_embeddings = 16.5"],
    ),
    ("llama", {"rope_theta": math.inf}, ["rope_theta = inf"]),
    (
        "llama",
        {"rms_norm_eps": {"__float__": "Infinity"}, "initializer_range": {"__float__": "abc"}},
        ["rms_norm_eps = inf", "initializer_range = {'__float__': 'abc'}"],
    ),
    ("llama", {"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
    ("llama", {"num_hidden_layers": 10**15, "hidden_size": 10**400}, ["num_hidden_layers", "hidden_size"]),
    ("llama", {"architectures": 5}, ["architectures = 5"]),
    ("llama", {"architectures": "MyLlamaForCausalLM"}, ["architectures = 'MyLlamaForCausalLM'"]),
    ("llama", {"architectures": [["LlamaForCausalLM"]]}, ["architectures = "]),
    ("llama", {"model_type": ["llama"]}, ["model_type ['llama']"]),
    ("mamba2", {"time_step_limit": [math.nan, 1.0]}, ["time_step_limit"]),
    ("nemotron_h", {"layers_block_type": [["mlp"]]}, ["layers_block_type"]),
]


@pytest.mark.parametrize(("kind", "changes", "named"), REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(
    kind: str, changes: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ExchangeError) as caught:
        import_config({"model_type": kind, **changes})
    assert [name for name in named if name not in str(caught.value)] == []


@pytest.mark.parametrize("kind", SIZES)
def test_a_saved_configuration_is_read_without_a_note(kind: str, tmp_path: Path) -> None:
    tiny(kind, **(FREE if kind == "nemotron_h" else {})).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    harmless = {"is_causal": True, "temperature": 0.7, "num_labels": 2, "layer_types": None, "_commit_hash": "x"}
    assert import_config(values | harmless).notes == ()
    assert "residual_multiplier" in " ".join(import_config(values | {"residual_multiplier": 2.0}).notes)


def test_limits_that_mamba2_drops_while_decoding_are_noted(tmp_path: Path) -> None:
    theirs = tiny("mamba2", time_step_limit=(0.3, 0.6))
    theirs.save_pretrained(tmp_path / "theirs")
    done = import_folder(tmp_path / "theirs", tmp_path / "ours")
    ours, ids = load_imported(tmp_path / "ours"), tokens()
    assert "time_step_limit = [0.3, 0.6]" in " ".join(done.notes)
    # What the note says of their class.
    assert largest_difference(their_decoding(theirs, ids), their_logits(theirs, ids)) > 0.01
    assert largest_difference(our_decoding(ours, ids), their_logits(theirs, ids)) < 1e-4
