"""Hybrid Mamba-2 / attention / MLP language model (Waleffe et al., arXiv 2406.07887).

Shapes: L = sequence length, B = batch, D = model width, V = vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.hybrid.config import HybridConfig
from pretrain.nn.block import Block, build_block
from pretrain.nn.initialisation import initialise, normal
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.norm import build_norm
from pretrain.ops.blocks import arithmetic_dtype
from pretrain.ops.softcap import soft_cap
from pretrain.parallel.layers import ParallelLayers
from pretrain.parallel.stage import Stage


@dataclass
class HybridCache:
    """Generation state: one cache for each layer (None for MLPs) and the number of positions consumed."""

    layers: list[Any]
    length: int = 0


class HybridLM(nn.Module):
    """Decoder-only language model with one single-sublayer residual layer for each pattern symbol.

    Parameters are named ``embedding.weight``, ``embedding_norm.*`` where there is one, ``layers.<i>.norm.*``,
    ``layers.<i>.mixer.*``, further ones of the layer's wiring (``layers.<i>.out_norm.*``), ``final_norm.*`` and, unless
    tied, ``head.weight``, i counting the layers of the whole model. Their values are undefined until
    :meth:`reset_parameters` or a checkpoint load.

    A pipeline ``stage`` holds its own layers only. Where embedding and head are tied and lie on different stages, each
    holds a copy of ``embedding.weight``, and the engine has to sum their gradients.

    Attributes:
        activation_checkpointing: whether training keeps only each layer's input and computes the layer again in the
            backward pass.
        vocabulary: the columns of the logits computed here; None for all.
    """

    def __init__(self, config: HybridConfig, layers: ParallelLayers, stage: Stage | None = None) -> None:
        super().__init__()
        self.config = config
        self.stage = stage or Stage.whole(config.num_layers)
        self.activation_checkpointing = False
        self.vocabulary = layers.vocabulary(config.vocab_size)
        self._parallel = layers
        width, tied = config.width, config.tied_embeddings
        if self.stage.has_embedding or (self.stage.has_head and tied):
            self.embedding = layers.embedding(config.vocab_size, width)
        if self.stage.has_embedding and config.norm.embedding:
            self.embedding_norm = build_norm(layers, width, config.norm)
        self.layers = nn.ModuleDict(
            {
                str(i): build_block(
                    layers, width, config.norm, config.mixer(config.layer_pattern[i]).build(layers, config.place(i))
                )
                for i in range(self.stage.first, self.stage.stop)
            }
        )
        if self.stage.has_head:
            if config.norm.final:
                self.final_norm = build_norm(layers, width, config.norm)
            self.head = None if tied else layers.head(width, config.vocab_size)
        if (shared := self.shared_embedding_weight()) is not None:
            _mark_shared(shared, self.stage)

    def shared_embedding_weight(self) -> nn.Parameter | None:
        """The matrix that embedding and head share, where this stage holds (a copy of) it; None when untied."""
        if not self.config.tied_embeddings or not (self.stage.has_embedding or self.stage.has_head):
            return None
        assert isinstance(self.embedding.weight, nn.Parameter)
        return self.embedding.weight

    def reset_parameters(self, seed: int) -> None:
        """Initialise every parameter from (seed, canonical name); see :mod:`pretrain.nn.initialisation`.

        Embedding and projections are normal with ``init_std``; projections that write to the residual stream
        are divided by the square root of the number of layers, so that its variance does not grow with depth.
        """
        std = self.config.init_std
        out_std = std / math.sqrt(self.config.num_layers)
        initialisers = {"embedding.weight": normal(std), "head.weight": normal(std)}
        for norm in ("embedding_norm", "final_norm"):
            if hasattr(self, norm):
                fills = getattr(self, norm).initialisers()
                initialisers |= {f"{norm}.{name}": fill for name, fill in fills.items()}
        for index, layer in self.layers.items():
            assert isinstance(layer, Block)
            for name, fill in layer.initialisers(std, out_std).items():
                initialisers[f"layers.{index}.{name}"] = fill
        initialise(self, initialisers, seed)

    def forward(
        self,
        tokens_LB: Tensor,
        seq_idx_LB: Tensor | None = None,
        position_ids_LB: Tensor | None = None,
        hidden_LBD: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens_LB: int [L, B], on every stage and tensor-parallel rank.
            seq_idx_LB: document of each token within its row (padding: -1, at the end); no information
                crosses documents. None when every row is one document.
            position_ids_LB: position of each token within its document; None counts from 0. Only read with
                ``rope_theta``.
            hidden_LBD: what the stage before returned, on a stage without embedding.

        Returns:
            logits_LBV in the parameters' dtype (the columns of ``vocabulary`` only, where it is set); on a stage
            without head, the hidden states x_LBD (with sequence parallelism this rank's share of L).

        Raises:
            ValueError: if the id tensors are not shaped like the tokens.
        """
        length, batch_size = tokens_LB.shape
        layout = SequenceLayout(length, batch_size, tokens_LB.device, seq_idx_LB, position_ids_LB)
        if self.stage.has_embedding:
            assert hidden_LBD is None, "hidden states given to the stage that embeds the tokens"
            x_LBD = self._embed(tokens_LB)
        else:
            assert hidden_LBD is not None, "a stage without embedding needs hidden states"
            x_LBD = hidden_LBD
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers.values():
            if recompute:
                # No layer draws from torch's global generators, so there is no state to restore.
                x_LBD = checkpoint(layer, x_LBD, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                x_LBD = layer(x_LBD, layout)
        return self._logits(x_LBD) if self.stage.has_head else x_LBD

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> HybridCache:
        """Empty generation cache; ``dtype`` is that of the parameters. Mamba-2 states are always kept in
        fp32.
        """
        assert self.stage == Stage.whole(self.config.num_layers), "generation needs the whole model on one rank"
        assert self.vocabulary is None, "generation needs the whole model on one rank"
        device = torch.device(device)
        layers = self.layers.values()
        return HybridCache([layer.mixer.init_cache(batch_size, dtype, device) for layer in layers])  # type: ignore[union-attr,operator]

    @torch.no_grad()
    def prefill(self, tokens_LB: Tensor, cache: HybridCache) -> Tensor:
        """Run a prompt (one document a row, equal lengths) through an empty cache; returns logits_LBV.

        Raises:
            ValueError: if the cache is not empty or the prompt is.
        """
        if cache.length or not len(tokens_LB):
            raise ValueError(
                f"prefill: found {len(tokens_LB)} tokens and a cache of length {cache.length}, expected "
                "at least one token and an empty cache; use decode to continue, init_cache to start anew"
            )
        return self._advance(tokens_LB, cache)

    @torch.no_grad()
    def decode(self, tokens_B: Tensor, cache: HybridCache) -> Tensor:
        """Consume one token for each row and return logits_BV of the next; time independent of length but for
        attention.
        """
        return self._advance(tokens_B.unsqueeze(0), cache).squeeze(0)

    def _advance(self, tokens_LB: Tensor, cache: HybridCache) -> Tensor:
        length, batch_size = tokens_LB.shape
        layout = SequenceLayout(length, batch_size, tokens_LB.device, first_position=cache.length)
        x_LBD = self._embed(tokens_LB)
        for layer, layer_cache in zip(self.layers.values(), cache.layers, strict=True):
            x_LBD = layer(x_LBD, layout, layer_cache)
        cache.length += length
        return self._logits(x_LBD)

    def _embed(self, tokens_LB: Tensor) -> Tensor:
        """The residual stream before the first layer, in its dtype."""
        x_LBD = self.embedding(tokens_LB)
        dtype = arithmetic_dtype(x_LBD.dtype) if self.config.residual_fp32 else x_LBD.dtype
        return self.embedding_norm(x_LBD, dtype) if self.config.norm.embedding else x_LBD.to(dtype)

    def _logits(self, x_LBD: Tensor) -> Tensor:
        shared = self.shared_embedding_weight()
        weight = self.head.weight if shared is None and self.head is not None else shared
        assert isinstance(weight, Tensor)
        x_LBD = self.final_norm(x_LBD, weight.dtype) if self.config.norm.final else x_LBD.to(weight.dtype)
        logits_LBV = self._parallel.tied_logits(x_LBD, weight) if self.head is None else self.head(x_LBD)
        cap = self.config.logit_softcap
        return logits_LBV if cap is None else soft_cap(logits_LBV, cap)


def _mark_shared(weight: nn.Parameter, stage: Stage) -> None:
    """Tell Megatron that ``weight`` works both as embedding and as head: attributes that its optimizer and
    ``DistributedDataParallel`` look up. Other engines do not read them.
    """
    if stage.has_embedding and stage.has_head:
        weight.zero_out_wgrad = True  # type: ignore[attr-defined]
        return
    weight.shared_embedding = True  # type: ignore[attr-defined]
    if not stage.has_embedding:
        weight.shared = True  # type: ignore[attr-defined]  # a copy: left out of the gradient norm
