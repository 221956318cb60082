"""Tiny models of ``transformers`` with random weights, and running them and ours side by side.

Shapes: B = batch, L = sequence length, V = vocabulary. Logits are [B, L, V], as in ``transformers``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from support.saving import save_by_ranks, whole
from torch import Tensor, nn

from pretrain.checkpoint.locate import checkpoint_folder
from pretrain.checkpoint.reader import CheckpointReader, load_weights
from pretrain.exchange.imported import imported_model
from pretrain.models.hybrid.config import HybridConfig
from pretrain.models.hybrid.model import HybridLM
from pretrain.parallel.canonical import canonical_parameters
from pretrain.parallel.layers import TorchLayers

VOCABULARY = 61
PREFILL = 24
STEPS = 32

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "state_size": 8,
        "chunk_size": 16,
    },
    "nemotron_h": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "max_position_embeddings": 64,
    },
}


def tiny(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of ``transformers`` in evaluation mode; ``kind`` is its model_type."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    names = {"llama": "Llama", "mamba": "Mamba", "mamba2": "Mamba2", "nemotron_h": "NemotronH"}
    config = getattr(transformers, f"{names[kind]}Config")(**(SIZES[kind] | changes))
    return randomised(getattr(transformers, f"{names[kind]}ForCausalLM")(config), seed).eval()


@torch.no_grad()
def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter drawn anew: also norms, biases, decays, skips and steps, so that none is left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        last = name.removesuffix(".weight").rpartition(".")[2]
        if "norm" in last or last == "D":
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif last == "A_log":
            parameter.uniform_(-1.0, 1.5, generator=generator)
        elif last == "dt_bias" or name.endswith("dt_proj.bias"):
            parameter.uniform_(-4.0, 0.5, generator=generator)
        elif "conv" in name or name.endswith("bias"):
            parameter.uniform_(-0.5, 0.5, generator=generator)
        else:
            parameter.normal_(0.0, 0.15, generator=generator)
    return model


def tokens(rows: int = 2, length: int = PREFILL + STEPS, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def load_imported(folder: Path) -> HybridLM:
    """Our model from an imported folder, in evaluation mode."""
    return load_ours(imported_model(folder), checkpoint_folder(folder))


def load_ours(config: HybridConfig, checkpoint: Path) -> HybridLM:
    model = config.build(TorchLayers())
    load_weights(model, CheckpointReader(checkpoint))
    return model.eval()


@torch.no_grad()
def their_logits(model: Any, ids_BL: Tensor) -> Tensor:
    return torch.as_tensor(model(ids_BL, use_cache=False).logits).float()


@torch.no_grad()
def their_decoding(model: Any, ids_BL: Tensor, prefill: int = PREFILL) -> Tensor:
    """Logits of a cached prefill and of teacher-forced steps, one token each."""
    name = "cache_params" if "mamba" in model.config.model_type else "past_key_values"
    output = model(ids_BL[:, :prefill], use_cache=True)
    logits = [output.logits]
    for position in range(prefill, ids_BL.shape[1]):
        output = model(ids_BL[:, position : position + 1], use_cache=True, **{name: getattr(output, name)})
        logits.append(output.logits)
    return torch.cat(logits, dim=1).float()


@torch.no_grad()
def our_logits(model: HybridLM, ids_BL: Tensor) -> Tensor:
    return model(ids_BL.T).transpose(0, 1).float()


@torch.no_grad()
def our_decoding(model: HybridLM, ids_BL: Tensor, prefill: int = PREFILL) -> Tensor:
    """As :func:`their_decoding`."""
    parameter = next(model.parameters())
    cache = model.init_cache(len(ids_BL), parameter.dtype, parameter.device)
    logits = [model.prefill(ids_BL[:, :prefill].T, cache).transpose(0, 1)]
    for position in range(prefill, ids_BL.shape[1]):
        logits.append(model.decode(ids_BL[:, position], cache).unsqueeze(1))
    return torch.cat(logits, dim=1).float()


def save_weights(model: nn.Module, folder: Path, step: int = 5) -> Path:
    """A checkpoint of a model of ours, as a run would save it but for the optimizer's state."""
    fragments = [whole(part.name, "master", p.view(part)) for p in canonical_parameters(model) for part in p.parts]
    return save_by_ranks(folder, step, [fragments])


def largest_difference(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    return float((first - second).abs().max())
