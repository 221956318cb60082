"""``pretrain import``, ``pretrain export`` and ``train.init_from`` as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Outcome, pretrain, same_tensors
from support.huggingface import SIZES, load_ours, our_logits, their_logits, tiny
from support.small_text import VOCABULARY, small_run
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.check import check
from pretrain.config.components import build_component
from pretrain.config.freeze import load

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LENGTH = 32


def run(path: Path, data_path: Path, *arguments: Any) -> Any:
    return pretrain(
        "run",
        "--run-dir",
        path,
        *small_run(data_path, LENGTH),
        *arguments,
        cwd=path.parent,
    )


def validation_loss(model: Any, run_path: Path) -> float:
    """Mean nats per target of the whole validation split of a run, by a model of ``transformers``."""
    config = check(load((run_path / "config.yaml").read_text()))
    sources = build_component(config.data, seed=config.run.seed)
    total = targets = 0.0
    for index in range(sources.validation.num_samples):
        batch = sources.validation.batch([index])
        tokens, mask = torch.as_tensor(batch["tokens"]).long(), torch.as_tensor(batch["loss_mask"]).bool()
        wanted, documents = torch.as_tensor(batch["targets"]).long(), torch.as_tensor(batch["seq_idx"])[0]
        # One document at a time: their classes know no packing.
        for document in documents.unique():
            here = (documents == document).nonzero().flatten()
            if document < 0 or not mask[0, here].any():
                continue
            logits = their_logits(model, tokens[:, here])[0]
            losses = cross_entropy(logits.double(), wanted[0, here], reduction="none")
            total += float(losses[mask[0, here]].sum())
            targets += float(mask[0, here].sum())
    for source in (sources.train, sources.validation):
        source.close()
    return total / targets


def test_a_run_is_exported_and_loads_in_transformers(data_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "whole"
    model = [
        "model.pattern=M-*-",
        "model.mlp.activation=relu2",
        "model.tied_embeddings=false",
    ]
    result = run(path, data_path, *model, "train.final_eval=true")
    assert result.returncode == 0, result.stderr
    exported = pretrain("export", path, tmp_path / "hf", "--shard-mib", "1")
    assert exported.returncode == 0, exported.stderr
    assert "NemotronHForCausalLM" in exported.stdout
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    config = check(load((path / "config.yaml").read_text())).model
    checkpoint = CheckpointStore(path / "checkpoints").latest()
    assert checkpoint is not None
    ids = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    difference = (our_logits(load_ours(config, checkpoint), ids) - their_logits(theirs, ids)).abs().max()
    assert difference < 1e-4
    assert validation_loss(theirs, path) == pytest.approx(Outcome(path).validation()[8], rel=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "<|eos|>"

    # A checkpoint of the run, rounded to bf16.
    earlier = path / "checkpoints" / "step_00000004"
    assert pretrain("export", earlier, tmp_path / "bf16", "--dtype", "bf16").returncode == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto").dtype == torch.bfloat16

    refused = pretrain("export", path, tmp_path / "llama", "--architecture", "llama")
    assert refused.returncode == 2
    assert "pattern = 'M-*-'" in refused.stderr
    assert not (tmp_path / "llama").exists()


def test_an_imported_model_is_trained_further(data_path: Path, tmp_path: Path) -> None:
    theirs = tiny("llama", vocab_size=VOCABULARY)
    theirs.save_pretrained(tmp_path / "hf")
    shutil.copyfile(data_path / "tokenizer.json", tmp_path / "hf" / "tokenizer.json")
    imported = tmp_path / "imported"
    result = pretrain("import", tmp_path / "hf", imported, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "LlamaForCausalLM" in result.stdout
    assert f"model=imported train.init_from={imported.name}" in result.stdout
    text = pretrain("generate", imported, "--prompt", "def ", "--tokens", "4")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("def ")

    chosen = ["--config-dir", imported, "model=imported", f"train.init_from={imported.name}"]
    path = tmp_path / "further"
    limits = ["train.steps=2", "train.eval_interval=1", "train.eval_samples=null", "train.checkpoint_interval=1"]
    first = run(path, data_path, *chosen, *limits)
    assert first.returncode == 0, first.stderr
    outcome = Outcome(path)
    assert outcome.validation()[0] == pytest.approx(validation_loss(theirs, path), rel=1e-5)
    assert outcome.validation()[2] < outcome.validation()[0]
    digest = json.loads((imported / "checkpoint" / "manifest.json").read_text())["digest"]
    assert json.loads((path / "initial_weights.json").read_text())["digest"] == digest
    manifest = json.loads((path / "checkpoints" / "step_00000001" / "manifest.json").read_text())
    assert manifest["training"]["initial_weights"] == digest
    assert load((path / "config.yaml").read_text())["train"]["init_from"] == str(imported)

    # Resumed where the imported folder is gone: it is not read again.
    imported.rename(tmp_path / "moved")
    longer = pretrain("resume", path, "train.steps=3", "--checkpoint", "1")
    assert longer.returncode == 0, longer.stderr
    imported = tmp_path / "moved"

    # Back to Hugging Face's format, without having been trained.
    back = pretrain("export", imported, tmp_path / "back")
    assert back.returncode == 0, back.stderr
    first_state = theirs.state_dict()
    second_state = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert same_tensors(first_state, second_state) == []


def test_weights_that_do_not_fit_stop_a_run_before_it_exists(data_path: Path, tmp_path: Path) -> None:
    tiny("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "hf")
    assert pretrain("import", tmp_path / "hf", tmp_path / "imported").returncode == 0
    chosen = ["--config-dir", tmp_path / "imported", "model=imported"]
    other = run(tmp_path / "other", data_path, *chosen, "train.init_from=imported", "model.mlp.hidden_size=50")
    assert other.returncode == 2
    assert f"layers.1.mixer.in_proj.gate.weight: shape [{SIZES['llama']['intermediate_size']}, 32]" in other.stderr
    missing = run(tmp_path / "other", data_path, *chosen, "train.init_from=nowhere")
    assert missing.returncode == 2
    assert "no such folder" in missing.stderr
    file = next((tmp_path / "imported" / "checkpoint").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    damaged = run(tmp_path / "other", data_path, *chosen, "train.init_from=imported")
    assert damaged.returncode == 4
    assert file.name in damaged.stderr
    assert not (tmp_path / "other").exists()


def test_import_refuses_by_exit_code(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    result = pretrain("import", tmp_path / "hf", tmp_path / "ours")
    assert result.returncode == 2
    assert "model_type 'gpt2'" in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
