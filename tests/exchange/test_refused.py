"""What cannot be exchanged is refused before anything is written, with every reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.huggingface import VOCABULARY, save_weights, tiny
from support.hybrid import hybrid

from data_pipeline.prepare.tokenizer import train_byte_level_bpe
from pretrain.checkpoint.manifest import CheckpointError, CorruptCheckpointError
from pretrain.exchange.architecture import ExchangeError
from pretrain.exchange.export_model import export_folder
from pretrain.exchange.import_model import import_folder
from pretrain.exchange.model_config import export_config, import_config
from pretrain.models.hybrid.config import HybridConfig
from pretrain.parallel.layers import TorchLayers


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def refusal(source: Path, tmp_path: Path, kind: type[ValueError] = ExchangeError) -> str:
    """The message of a refused import; nothing may be left of it."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(kind) as caught:
        import_folder(source, tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == before
    return str(caught.value)


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add, replace or (None) remove tensors; ``__`` stands for a dot."""
    path = folder / "model.safetensors"
    held = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)


def settings(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **changes}


def test_every_wrong_tensor_is_listed(theirs: Path, tmp_path: Path) -> None:
    rewrite(
        theirs,
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=None,
        model__layers__0__self_attn__rotary_scale=torch.ones(2),
        model__layers__0__mlp__down_proj__weight=torch.ones(32, 47),
        model__layers__0__input_layernorm__weight=torch.ones(32, dtype=torch.int8),
    )
    text = refusal(theirs, tmp_path)
    assert text.count("\n") == 5
    assert "model.norm.weight: missing, expected shape [32]" in text
    assert "model.layers.1.mlp.up_proj.weight: missing, expected shape [48, 32]" in text
    assert "model.layers.0.self_attn.rotary_scale: not in LlamaForCausalLM with these settings" in text
    assert "model.layers.0.mlp.down_proj.weight: shape [32, 47], expected [32, 48]" in text
    assert "model.layers.0.input_layernorm.weight: I8, expected one of F32, BF16, F16" in text


def test_frequencies_that_old_files_hold_are_left_out(theirs: Path, tmp_path: Path) -> None:
    rewrite(theirs, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    import_folder(theirs, tmp_path / "ours")


def test_a_vocabulary_that_does_not_fit(theirs: Path, tmp_path: Path) -> None:
    (theirs / "tokenizer.json").write_text(train_byte_level_bpe(["abc"], 258).text)
    rewrite(theirs, model__norm__weight=None)
    text = refusal(theirs, tmp_path)
    assert f"tokenizer.json has ids up to 257, the model a vocabulary of {VOCABULARY}" in text
    assert "model.norm.weight: missing" in text


def test_damaged_files(theirs: Path, tmp_path: Path) -> None:
    path = theirs / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert "model.safetensors: " in refusal(theirs, tmp_path, CorruptCheckpointError)
    path.write_bytes(b"\x01" * 100)
    assert "model.safetensors: " in refusal(theirs, tmp_path, CorruptCheckpointError)
    path.write_bytes(whole)
    rewrite(theirs, model__norm__weight=torch.full((32,), torch.nan))
    assert "model.norm.weight: holds values that are not finite" in refusal(theirs, tmp_path, CorruptCheckpointError)
    path.unlink()
    assert "expected model.safetensors or model.safetensors.index.json" in refusal(theirs, tmp_path)
    (theirs / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin: save the model with safetensors first" in refusal(theirs, tmp_path)
    (theirs / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(theirs, tmp_path)
    (theirs / "config.json").unlink()
    assert "config.json is missing" in refusal(theirs, tmp_path)


def test_an_index_that_its_files_do_not_keep(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    tiny("llama").save_pretrained(source, max_shard_size="16KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first, second, *_ = sorted(set(index["weight_map"].values()))
    (source / first).unlink()
    held = load_file(source / second)
    lost = sorted(held)[0]
    save_file({name: tensor for name, tensor in held.items() if name != lost}, source / second)
    text = refusal(source, tmp_path, CorruptCheckpointError)
    assert f"{first}: missing" in text
    assert f"{second}: no tensor {lost}" in text
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../outside.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../outside.safetensors: missing" in refusal(source, tmp_path, CorruptCheckpointError)


def test_another_architecture_is_named() -> None:
    with pytest.raises(
        ExchangeError, match=r"model_type 'gpt2', architectures \['GPT2LMHeadModel'\].*mamba2 \(Mamba2F"
    ):
        import_config({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(ExchangeError, match="model_type None"):
        import_config({})
    with pytest.raises(ExchangeError, match=r"\['LlamaForSequenceClassification'\].*expected LlamaForCausalLM"):
        import_config({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        (
            "llama",
            {"hidden_act": "gelu", "hidden_size": "64", "mlp_bias": 1},
            ["hidden_act = 'gelu'", "'64'", "mlp_bias"],
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_type = 'yarn'", "llama3"]),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, ["low_freq_factor", "high_freq_factor"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, ["num_kv_heads = 3"]),
        ("mamba", {"hidden_act": "relu", "intermediate_size": 77}, ["hidden_act", "intermediate_size = 77"]),
        ("mamba2", {"num_heads": 7}, ["num_heads = 7"]),
        ("mamba2", {"time_step_limit": [0.0]}, ["time_step_limit"]),
        ("nemotron_h", {"layers_block_type": ["conv"]}, ["layers_block_type"]),
        ("nemotron_h", {"hybrid_override_pattern": "M-x"}, ["hybrid_override_pattern = 'M-x'"]),
        (
            "nemotron_h",
            {"hybrid_override_pattern": "ME-*", "n_group": 2, "topk_group": 2, "moe_latent_size": 8, "mlp_bias": True},
            ["n_group = 2", "topk_group = 2", "moe_latent_size = 8", "mlp_bias"],
        ),
        (
            "nemotron_h",
            {
                "hybrid_override_pattern": "M-*",
                "mlp_hidden_act": "silu",
                "sliding_window": 8,
                "attention_bias": True,
            },
            ["mlp_hidden_act", "sliding_window", "attention_bias"],
        ),
        ("nemotron_h", {"hybrid_override_pattern": "M", "time_step_limit": [0.1, 0.2]}, ["time_step_limit"]),
        ("nemotron_h", {"hybrid_override_pattern": "M", "num_nextn_predict_layers": 1}, ["num_nextn_predict_layers"]),
    ],
)
def test_every_setting_that_is_not_computed_here_is_named(kind: str, changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ExchangeError) as caught:
        import_config(settings(kind, **changes))
    assert [name for name in named if name not in str(caught.value)] == []


def test_a_router_that_is_balanced_by_a_bias(tmp_path: Path) -> None:
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24}
    tiny("nemotron_h", layers_block_type=["moe"], **experts).save_pretrained(tmp_path / "theirs")
    name = "backbone.layers.0.mixer.gate.e_score_correction_bias"
    rewrite(tmp_path / "theirs", **{name: torch.tensor([0.0, 0.5, 0.0, 0.0])})
    assert f"{name}: not zero" in refusal(tmp_path / "theirs", tmp_path)


def test_settings_that_are_not_known_are_told() -> None:
    done = import_config(settings("llama", residual_multiplier=2.0, attention_dropout=0.1))
    assert any("residual_multiplier" in note for note in done.notes)
    assert any("attention_dropout = 0.1" in note for note in done.notes)


LLAMA = {"attention__num_heads": 4, "attention__rope_theta": 1e4}


@pytest.mark.parametrize(
    ("wanted", "pattern", "changes", "reasons"),
    [
        ("llama", "*-*-", LLAMA | {"mlp__activation": "gelu"}, ["mlp.activation = 'gelu'"]),
        ("llama", "*-*-", {"attention__num_heads": 4}, ["attention.rope_theta = None"]),
        ("llama", "-*-*", LLAMA, ["pattern = '-*-*'"]),
        ("llama", "*-*", LLAMA, ["pattern = '*-*'"]),
        ("llama", "M*-", LLAMA, ["pattern = 'M*-'"]),
        (
            "llama",
            "*-",
            LLAMA
            | {
                "attention__qk_norm": True,
                "attention__softcap": 30.0,
                "attention__windows": (8,),
                "attention__gate": "head",
                "attention__qkv_bias": True,
                "attention__rope_fraction": 0.5,
                "norm__kind": "layer",
                "norm__placement": "post",
                "logit_softcap": 20.0,
            },
            [
                "qk_norm",
                "softcap",
                "windows",
                "gate",
                "out_bias",
                "rope_fraction",
                "kind",
                "placement",
                "logit_softcap",
            ],
        ),
        ("mamba", "mM", {}, ["pattern = 'mM'"]),
        ("mamba2", "MM", {"mamba2__norm_groups": 1, "mamba2__groups": 2}, ["mamba2.norm_groups = 1.0"]),
        ("nemotron_h", "M*", LLAMA, ["attention.rope_theta = 10000.0"]),
        ("nemotron_h", "*", {"attention__qkv_bias": True}, ["attention.qkv_bias = True"]),
        ("nemotron_h", "Mm", {}, ["pattern = 'Mm'"]),
        ("nemotron_h", "M-", {"mlp__activation": "swiglu"}, ["mlp.activation = 'swiglu'"]),
        ("nemotron_h", "M", {"mamba2__dt_limit": (0.1, 0.5)}, ["mamba2.dt_limit"]),
        (
            "nemotron_h",
            "E",
            {"moe__router": "softmax", "moe__activation": "relu2"},
            ["moe.router = 'softmax'", "shared"],
        ),
    ],
)
def test_every_reason_why_a_model_is_not_of_an_architecture(
    wanted: str, pattern: str, changes: dict[str, Any], reasons: list[str]
) -> None:
    config = hybrid(pattern, 256, VOCABULARY, **changes)
    with pytest.raises(ExchangeError) as caught:
        export_config(config, wanted)
    assert [reason for reason in reasons if reason not in str(caught.value)] == []


def test_what_does_not_change_the_model_is_no_reason() -> None:
    config = hybrid(
        "*-*-", 64, VOCABULARY, **LLAMA, attention__windows=(None,), attention__clip_zeta=1.1, max_sequence_length=64
    )
    assert export_config(config)[0].model_type == "llama"
    assert export_config(hybrid("MM", 64, VOCABULARY, mamba2__norm_groups=1))[0].model_type == "mamba2"


def test_without_a_wish_the_reasons_of_all_architectures_are_listed(tmp_path: Path) -> None:
    config = hybrid("Mm", 64, VOCABULARY, mamba2__head_dim=16)
    with pytest.raises(ExchangeError) as caught:
        export_config(config)
    for name in ("LlamaForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM", "NemotronHForCausalLM"):
        assert f"no {name}" in str(caught.value)


def test_exports_of_another_model_or_over_files(tmp_path: Path) -> None:
    config = hybrid("M", 32, VOCABULARY, mamba2__head_dim=8)
    other = hybrid("MM", 32, VOCABULARY, mamba2__head_dim=8)
    checkpoint = _save(config, tmp_path)
    with pytest.raises(CheckpointError, match=r"layers.1.norm.weight: missing"):
        export_folder(checkpoint, other, tmp_path / "out")
    deep = hybrid("M" * 5, 32, VOCABULARY, mamba2__head_dim=8)
    with pytest.raises(CheckpointError) as caught:
        export_folder(checkpoint, deep, tmp_path / "out")
    missing = {name for name, _ in deep.build(TorchLayers()).named_parameters() if name.split(".")[1] in "1234"}
    assert len(missing) > 20
    told = str(caught.value)
    assert told.count(": missing in the checkpoint") >= len(missing)
    assert "more" not in told
    (tmp_path / "tokenizer.json").write_text(train_byte_level_bpe(["abc"], 258).text)
    with pytest.raises(ExchangeError, match="ids up to 257"):
        export_folder(checkpoint, config, tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="is not empty"):
        export_folder(checkpoint, config, checkpoint)
    damaged = next(checkpoint.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match=damaged.name):
        export_folder(checkpoint, config, tmp_path / "out")


def _save(config: HybridConfig, folder: Path) -> Path:
    model = config.build(TorchLayers())
    model.reset_parameters(1)
    return save_weights(model, folder / "run")
