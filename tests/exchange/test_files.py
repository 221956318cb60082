"""Files on both sides: several with an index, bf16, heads that are tied, tokenizers, older spellings of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.huggingface import load_imported, our_logits, save_weights, their_logits, tiny, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from data_pipeline.prepare.tokenizer import TokenizerFile, train_byte_level_bpe
from pretrain.checkpoint.manifest import CorruptCheckpointError
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import verify
from pretrain.exchange.export_model import export_folder
from pretrain.exchange.import_model import import_folder


def edit_config(folder: Path, changes: dict[str, Any], *removed: str) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in removed}))


def test_a_sharded_model_is_read_and_written(tmp_path: Path) -> None:
    theirs = tiny("llama", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="16KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    done = import_folder(tmp_path / "theirs", tmp_path / "ours")
    verify(tmp_path / "ours" / "checkpoint")
    export_folder(tmp_path / "ours" / "checkpoint", done.config.model, tmp_path / "back", shard_bytes=20_000)
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "back" / "model.safetensors").exists()
    assert all(path.stat().st_size < 22_000 for path in shards)
    for path in shards:
        assert safe_open(path, framework="pt").metadata() == {"format": "pt"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(their_logits(again, tokens()), their_logits(theirs, tokens()))


def test_a_sharded_export_in_bf16_is_the_model_rounded(tmp_path: Path) -> None:
    theirs = tiny("nemotron_h", time_step_min=1e-30)
    theirs.save_pretrained(tmp_path / "theirs")
    done = import_folder(tmp_path / "theirs", tmp_path / "ours")
    checkpoint = tmp_path / "ours" / "checkpoint"
    export_folder(checkpoint, done.config.model, tmp_path / "back", dtype="bf16", shard_bytes=10_000)
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 2
    again, rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").eval(), theirs.bfloat16()
    assert again.dtype == torch.bfloat16
    first, second = again.state_dict(), rounded.state_dict()
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key].bfloat16(), second[key])] == []
    # In one precision for the rest of the numbers, too.
    wanted = their_logits(rounded.float(), tokens())
    assert torch.equal(their_logits(again.float(), tokens()), wanted)
    import_folder(tmp_path / "back", tmp_path / "again")
    ours = load_imported(tmp_path / "again")
    torch.testing.assert_close(our_logits(ours, tokens()), wanted, atol=1e-4, rtol=0)

    whole = shards[1].read_bytes()
    length = int.from_bytes(whole[:8], "little")
    damaged = {
        "cut": whole[:-2],
        "longer": whole + b"\0\0",
        "header": whole[:8] + b"#" * length + whole[8 + length :],
        "length of the header": (1 << 60).to_bytes(8, "little") + whole[8:],
        "empty": b"",
    }
    for name, content in damaged.items():
        shards[1].write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=shards[1].name):
            import_folder(tmp_path / "back", tmp_path / name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_bf16_files_keep_every_bit(kind: str, tmp_path: Path) -> None:
    theirs = tiny(kind).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    done = import_folder(tmp_path / "theirs", tmp_path / "ours")
    reader = CheckpointReader(tmp_path / "ours" / "checkpoint")
    assert reader.slots() == ["master"]
    assert {reader.dtype(name, "master") for name in reader.names("master")} == {torch.float32}
    export_folder(tmp_path / "ours" / "checkpoint", done.config.model, tmp_path / "back", dtype="bf16")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert again.dtype == torch.bfloat16


def test_a_tied_head_may_be_stored_and_must_then_be_the_embedding(tmp_path: Path) -> None:
    theirs = tiny("llama", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    ours = load_imported(tmp_path / "ours")
    assert ours.head is None
    torch.testing.assert_close(our_logits(ours, tokens()), their_logits(theirs, tokens()), atol=1e-4, rtol=0)

    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight: differs from model.embed_tokens.weight"):
        import_folder(tmp_path / "theirs", tmp_path / "other")


def test_settings_of_older_releases_are_understood(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    theirs = tiny("llama", rope_parameters={**scaling, "rope_theta": 300.0})
    theirs.save_pretrained(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", {"rope_theta": 300.0, "rope_scaling": scaling}, "rope_parameters")
    done = import_folder(tmp_path / "theirs", tmp_path / "ours")
    ours, ids = load_imported(tmp_path / "ours"), tokens()
    torch.testing.assert_close(our_logits(ours, ids), their_logits(theirs, ids), atol=1e-4, rtol=0)
    export_folder(tmp_path / "ours" / "checkpoint", done.config.model, tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["rope_scaling"] == scaling
    assert written["rope_theta"] == 300.0
    assert LlamaConfig.from_pretrained(tmp_path / "back").rope_parameters == scaling | {"rope_theta": 300.0}


def test_nemotron_h_by_its_old_pattern_and_the_names_of_its_class(tmp_path: Path) -> None:
    theirs = tiny("nemotron_h", time_step_min=1e-30)
    theirs.save_pretrained(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", {"hybrid_override_pattern": "M-*M-"}, "layers_block_type", "layer_types")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    assert any(name.startswith("backbone.") for name in tensors)
    save_file({name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}, path)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    ours = load_imported(tmp_path / "ours")
    assert ours.config.layer_pattern == "M-*M-"
    torch.testing.assert_close(our_logits(ours, tokens()), their_logits(theirs, tokens()), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def bpe() -> TokenizerFile:
    return train_byte_level_bpe(["def main(): return 1\n"] * 20, 270)


def test_the_tokenizer_goes_along_with_the_ids_that_frame_a_document(tmp_path: Path, bpe: TokenizerFile) -> None:
    theirs = tiny("llama", vocab_size=bpe.vocab_size + 10)
    theirs.save_pretrained(tmp_path / "theirs")
    done = import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert "no tokenizer.json" in " ".join(done.notes)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(bpe.text)
    export_folder(tmp_path / "ours" / "checkpoint", done.config.model, tmp_path / "back", tokenizer=tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "def main(): return 1"
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert (loaded.bos_token_id, loaded.eos_token_id) == (bpe.bos_id, bpe.eos_id)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (bpe.bos_id, bpe.eos_id)
    generation = GenerationConfig.from_pretrained(tmp_path / "back")
    assert (generation.bos_token_id, generation.eos_token_id) == (bpe.bos_id, bpe.eos_id)

    # A model with padding in its vocabulary comes back with its tokenizer and what lies beside it.
    import_folder(tmp_path / "back", tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_an_export_generates_in_transformers(tmp_path: Path, bpe: TokenizerFile) -> None:
    """Greedy text of ours, and of ``generate`` of theirs on the exported folder."""
    from pretrain.models.generation import generate

    theirs = tiny("mamba2", vocab_size=bpe.vocab_size, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "theirs")
    done = import_folder(tmp_path / "theirs", tmp_path / "ours")
    ours = load_imported(tmp_path / "ours")
    checkpoint = save_weights(ours, tmp_path / "run")
    (tmp_path / "tokenizer.json").write_text(bpe.text)
    export_folder(checkpoint, done.config.model, tmp_path / "back", tokenizer=tmp_path / "tokenizer.json")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    prompt = [bpe.bos_id, 40, 41, 42]
    wanted = generate(ours, prompt, 12, temperature=0)
    found = again.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert found[0, len(prompt) :].tolist() == wanted
