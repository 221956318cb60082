"""The same weights give the same logits in ``transformers`` and here, in both directions, whole and token by token.

fp32 on CPU; the logits reach about 3 in size. A wrong order of projections or groups differs by more than 0.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.huggingface import (
    VOCABULARY,
    largest_difference,
    load_imported,
    load_ours,
    our_decoding,
    our_logits,
    randomised,
    save_weights,
    their_decoding,
    their_logits,
    tiny,
    tokens,
)
from support.hybrid import hybrid
from transformers import AutoModelForCausalLM

from pretrain.exchange.export_model import export_folder
from pretrain.exchange.import_model import import_folder
from pretrain.models.hybrid.config import HybridConfig
from pretrain.parallel.layers import TorchLayers

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Nemotron-H of transformers does not apply the limit when it decodes, so the common cases have none.
FREE = {"time_step_min": 1e-30}
MOE = ["linear_attention", "moe", "full_attention", "moe"]
EXPERTS = {
    "layers_block_type": MOE,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, every head its own keys, tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, biases, wide heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama 3 frequencies": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear frequencies": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "mamba": ("mamba", {}),
    "mamba, untied, biases, dt rank": (
        "mamba",
        {"tie_word_embeddings": False, "use_bias": True, "time_step_rank": 5, "conv_kernel": 3},
    ),
    "mamba, no bias of the convolution": ("mamba", {"use_conv_bias": False}),
    "mamba2": ("mamba2", {}),
    "mamba2, tied, biases": ("mamba2", {"tie_word_embeddings": True, "use_bias": True}),
    "mamba2, one group, no bias of the convolution": ("mamba2", {"n_groups": 1, "use_conv_bias": False}),
    "mamba2, groups, other expansion": ("mamba2", {"n_groups": 4, "expand": 3, "num_heads": 12}),
    "nemotron_h": ("nemotron_h", FREE),
    "nemotron_h, biases": ("nemotron_h", FREE | {"mlp_bias": True, "use_bias": True}),
    "nemotron_h, inner width of its own": ("nemotron_h", FREE | {"mamba_num_heads": 6, "n_groups": 2}),
    "nemotron_h, experts": ("nemotron_h", FREE | EXPERTS),
    "nemotron_h, experts not normalised": (
        "nemotron_h",
        FREE | EXPERTS | {"norm_topk_prob": False, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_theirs_imported_and_exported_again(name: str, tmp_path: Path) -> None:
    kind, changes = CASES[name]
    theirs = tiny(kind, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    done = import_folder(tmp_path / "theirs", tmp_path / "ours")
    ours, ids = load_imported(tmp_path / "ours"), tokens()
    wanted = their_logits(theirs, ids)
    assert wanted.abs().max() > 0.5
    whole = largest_difference(our_logits(ours, ids), wanted)
    steps = largest_difference(our_decoding(ours, ids), wanted)
    cached = largest_difference(our_decoding(ours, ids), their_decoding(theirs, ids))
    print(f"{name}: import, whole {whole:.1e}, steps {steps:.1e}, against their steps {cached:.1e}")
    assert max(whole, steps, cached) < TOLERANCE

    export_folder(tmp_path / "ours" / "checkpoint", done.config.model, tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(theirs)
    first, second = theirs.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert torch.equal(their_logits(again, ids), wanted)


NO_ROPE = {"attention__num_heads": 4, "attention__num_kv_heads": 2, "mlp__activation": "relu2", "mlp__hidden_size": 48}
SSM = {"mamba2__head_dim": 8, "mamba2__state_dim": 8, "mamba2__chunk_size": 16}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "*-*-",
        {"attention__num_heads": 4, "attention__num_kv_heads": 2, "attention__rope_theta": 1000.0, "mlp__ratio": 1.5},
    ),
    "mamba": ("mm", {"mamba1__state_dim": 4}),
    "mamba2": ("MM", SSM | {"mamba2__groups": 4, "tied_embeddings": False}),
    "nemotron_h": ("M-*MM-*", SSM | NO_ROPE | {"tied_embeddings": False, "residual_fp32": True}),
}


@pytest.mark.parametrize("kind", OURS)
def test_ours_exported_and_imported_again(kind: str, tmp_path: Path) -> None:
    pattern, changes = OURS[kind]
    config = hybrid(pattern, 32, VOCABULARY, norm__eps=1e-4, **changes)
    ours, checkpoint = _saved(config, tmp_path / "run")
    done = export_folder(checkpoint, config, tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert (theirs.config.model_type, type(theirs).__name__) == (kind, done.class_name)
    ids = tokens()
    wanted = our_logits(ours, ids)
    assert wanted.abs().max() > 0.5
    whole = largest_difference(their_logits(theirs, ids), wanted)
    cached = largest_difference(their_decoding(theirs, ids), our_decoding(ours, ids))
    print(f"{kind}: export, whole {whole:.1e}, cached steps {cached:.1e}")
    assert max(whole, cached) < TOLERANCE

    import_folder(tmp_path / "theirs", tmp_path / "again")
    again = load_imported(tmp_path / "again")
    first, second = ours.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_tied_model_becomes_a_nemotron_h_with_a_copy_as_head(tmp_path: Path) -> None:
    config = hybrid("M-*", 32, VOCABULARY, **SSM, **NO_ROPE)
    assert config.tied_embeddings
    ours, checkpoint = _saved(config, tmp_path / "run")
    done = export_folder(checkpoint, config, tmp_path / "theirs")
    assert "written twice" in " ".join(done.notes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert largest_difference(their_logits(theirs, tokens()), our_logits(ours, tokens())) < TOLERANCE


def test_limits_of_the_steps_are_those_of_a_whole_sequence(tmp_path: Path) -> None:
    """Their classes limit the steps in whole sequences only; ours in both, so that decoding continues the sequence."""
    for kind, changes in (("mamba2", {"time_step_limit": (0.3, 0.6)}), ("nemotron_h", {"time_step_min": 0.3})):
        theirs, free = tiny(kind, **changes), tiny(kind, **(FREE if kind == "nemotron_h" else {}))
        theirs.save_pretrained(tmp_path / kind)
        done = import_folder(tmp_path / kind, tmp_path / f"{kind} ours")
        ours, ids = load_imported(tmp_path / f"{kind} ours"), tokens()
        wanted = their_logits(theirs, ids)
        assert largest_difference(their_logits(free, ids), wanted) > 0.05
        assert largest_difference(our_logits(ours, ids), wanted) < TOLERANCE
        assert largest_difference(our_decoding(ours, ids), wanted) < TOLERANCE
        export_folder(tmp_path / f"{kind} ours" / "checkpoint", done.config.model, tmp_path / f"{kind} back")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind} back").eval()
        assert torch.equal(their_logits(again, ids), wanted)


def _saved(config: HybridConfig, folder: Path) -> tuple[Any, Path]:
    """A random model of ours, and a checkpoint that holds its weights."""
    model = config.build(TorchLayers())
    randomised(model, seed=3).eval()
    checkpoint = save_weights(model, folder)
    return load_ours(config, checkpoint), checkpoint
