"""Configuration of the hybrid state-space / attention language model. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from pretrain.models.hybrid.pattern import LayerRatios
from pretrain.nn.attention_config import AttentionConfig
from pretrain.nn.mamba1_config import Mamba1Config
from pretrain.nn.mamba2_config import Mamba2Config
from pretrain.nn.mixer_config import MixerConfig, Place, Violation, not_positive, uneven_share
from pretrain.nn.mlp_config import MLPConfig
from pretrain.nn.moe_config import MoEConfig
from pretrain.nn.norm_config import NormConfig

if TYPE_CHECKING:
    from pretrain.models.hybrid.model import HybridLM
    from pretrain.parallel.layers import ParallelLayers
    from pretrain.parallel.stage import Stage

MIXERS = {"M": "mamba2", "m": "mamba1", "*": "attention", "-": "mlp", "E": "moe"}
"""The field that configures the layers of each pattern symbol."""


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """Language model of single-sublayer residual layers, one per symbol of a pattern (arXiv 2406.07887).

    Either ``pattern`` or ``layer_ratios`` is given; :attr:`layer_pattern` is what follows from either.

    Attributes:
        pattern: ``M`` Mamba-2, ``m`` Mamba-1, ``*`` attention, ``-`` MLP, ``E`` MoE, first layer first.
        layer_ratios: number of layers and share of each kind, spread evenly.
        width: features of the residual stream.
        vocab_size: rows of the embedding.
        max_sequence_length: longest sequence to train on, in tokens; None for no limit.
        mamba2, mamba1, attention, mlp, moe: the layers of each kind.
        norm: the norms between layers.
        tied_embeddings: the output head is the embedding matrix.
        logit_softcap: logits x become logit_softcap * tanh(x / logit_softcap) (Gemma 2); None for plain logits.
        residual_fp32: the residual stream is kept in fp32 between layers, whatever the precision of the parameters.
        init_std: standard deviation of embedding and projection weights at the start; output projections of
            the sublayers get ``init_std / sqrt(number of layers)``.
    """

    renamed_fields: ClassVar[dict[str, str]] = {
        "num_heads": "attention.num_heads",
        "num_kv_heads": "attention.num_kv_heads",
        "head_dim": "attention.head_dim",
        "rope_theta": "attention.rope_theta",
        "mamba_head_dim": "mamba2.head_dim",
        "mamba_state_dim": "mamba2.state_dim",
        "mamba_groups": "mamba2.groups",
        "mamba_expand": "mamba2.expand",
        "mamba_conv_kernel": "mamba2.conv_kernel",
        "mamba_chunk_size": "mamba2.chunk_size",
        "mlp_ratio": "mlp.ratio",
        "mlp_hidden_size": "mlp.hidden_size",
        "mlp_activation": "mlp.activation",
        "norm_eps": "norm.eps",
    }
    """Fields of earlier versions: see :func:`pretrain.config.components.with_renamed_fields`."""

    pattern: str | None = None
    layer_ratios: LayerRatios | None = None
    width: int
    vocab_size: int
    max_sequence_length: int | None = None
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    mamba1: Mamba1Config = field(default_factory=Mamba1Config)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    tied_embeddings: bool = True
    logit_softcap: float | None = None
    residual_fp32: bool = False
    init_std: float = 0.02

    @cached_property
    def layer_pattern(self) -> str:
        """Symbol of each layer, first layer first, written out or from the ratios; empty where these are invalid."""
        if self.pattern is not None or self.layer_ratios is None:
            return self.pattern or ""
        symbols = _symbols()
        return "" if any(self.layer_ratios.violations(symbols)) else self.layer_ratios.pattern(symbols)

    @cached_property
    def _occurrences(self) -> tuple[int, ...]:
        """For each layer, how many layers of its kind come before it."""
        seen: Counter[str] = Counter()
        places = []
        for symbol in self.layer_pattern:
            places.append(seen[symbol])
            seen[symbol] += 1
        return tuple(places)

    @property
    def num_layers(self) -> int:
        """Sublayers, one for each symbol of the pattern."""
        return len(self.layer_pattern)

    def mixer(self, symbol: str) -> MixerConfig:
        """Configuration of the layers of one symbol."""
        mixer: MixerConfig = getattr(self, MIXERS[symbol])
        return mixer

    def place(self, layer: int) -> Place:
        """Where the mixer of a layer (of the whole model) stands."""
        return Place(width=self.width, layer=layer, occurrence=self._occurrences[layer], norm_eps=self.norm.eps)

    def violations(self) -> Iterator[Violation]:
        """Every broken rule as (field, found, rule, fix). Mixers that the pattern lacks are not judged."""
        yield from self._pattern_violations()
        examples = {"width": 512, "vocab_size": 32768, "max_sequence_length": 4096, "init_std": 0.02}
        examples["logit_softcap"] = 30.0
        yield from not_positive(self, examples)
        yield from _within("norm", self.norm.violations())
        if self.width > 0:
            for symbol, name in self._kinds():
                faults = self.mixer(symbol).violations(self.width, self.layer_pattern.count(symbol))
                yield from _within(name, faults)

    def parallel_violations(
        self, tensor_parallel: int, sequence_parallel: bool, sequence_length: int | None
    ) -> Iterator[Violation]:
        """Every reason why ``tensor_parallel`` ranks cannot share this (otherwise valid) model, as in
        :meth:`violations`. ``sequence_length``: tokens of a training sequence, None if unknown.
        """
        if tensor_parallel == 1:
            return
        yield from uneven_share("vocab_size", self.vocab_size, tensor_parallel)
        for symbol, name in self._kinds():
            yield from _within(name, self.mixer(symbol).parallel_violations(self.width, tensor_parallel))
        if sequence_parallel and sequence_length is not None and sequence_length % tensor_parallel:
            larger = -(-sequence_length // tensor_parallel) * tensor_parallel
            fix = f"set the sequence length to {larger}, or sequence_parallel to false"
            rule = f"must be a multiple of the {tensor_parallel} tensor-parallel ranks with sequence_parallel"
            yield "sequence_length", sequence_length, rule, fix

    def layer_costs(self, sequence_length: int) -> list[float]:
        """Forward FLOPs per token of each layer, first layer first, for balancing pipeline stages."""
        from pretrain.models.hybrid.cost import layer_cost

        return [layer_cost(self, layer, sequence_length).flops_per_token for layer in range(self.num_layers)]

    def end_costs(self) -> tuple[float, float]:
        """Forward FLOPs per token of the embedding (a lookup: none) and of the head."""
        return 0.0, 2.0 * self.width * self.vocab_size

    def build(self, layers: ParallelLayers, stage: Stage | None = None) -> HybridLM:
        """Construct the module, or one pipeline stage of it; call its ``reset_parameters(seed)`` before training.

        Raises:
            ValueError: naming every violation.
        """
        from pretrain.models.hybrid.model import HybridLM

        faults = [f"{field} = {found!r}: {rule}; {fix}" for field, found, rule, fix in self.violations()]
        if faults:
            raise ValueError("model configuration is invalid:\n  " + "\n  ".join(faults))
        return HybridLM(self, layers, stage)

    def _kinds(self) -> list[tuple[str, str]]:
        """(symbol, field) of each known kind in the pattern."""
        return [(symbol, name) for symbol, name in MIXERS.items() if symbol in self.layer_pattern]

    def _pattern_violations(self) -> Iterator[Violation]:
        known = ", ".join(f"'{symbol}' {self.mixer(symbol).label}" for symbol in MIXERS)
        if self.layer_ratios is not None:
            yield from _within("layer_ratios", self.layer_ratios.violations(_symbols()))
            if self.pattern is not None:
                rule = "the layers are given twice, as pattern and as layer_ratios"
                yield "pattern", self.pattern, rule, "set one of the two to null"
        elif not self.pattern:
            rule = f"needs one symbol for each layer ({known}), or layer_ratios"
            yield "pattern", self.pattern, rule, "for example 'M-M*-M-M-'"
        pattern = self.pattern or ""
        unknown = "".join(sorted(set(pattern) - MIXERS.keys()))
        if unknown:
            kept = "".join(symbol for symbol in pattern if symbol in MIXERS)
            fix = f"remove {unknown!r}" + (f", for example {kept!r}" if kept else "")
            yield "pattern", pattern, f"symbols must be {known}", fix


def _symbols() -> dict[str, str]:
    """The pattern symbol of each kind of layer, by the name of its field."""
    return {name: symbol for symbol, name in MIXERS.items()}


def _within(name: str, violations: Iterator[Violation]) -> Iterator[Violation]:
    """Violations of a nested configuration under the name of its field."""
    for inner, found, rule, fix in violations:
        yield f"{name}.{inner}", found, rule, fix
