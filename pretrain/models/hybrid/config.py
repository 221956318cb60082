"""Configuration of the hybrid Mamba-2 / attention / MLP language model. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pretrain.models.hybrid.model import HybridLM
    from pretrain.parallel.layers import ParallelLayers
    from pretrain.parallel.stage import Stage

SYMBOLS = {"M": "Mamba-2", "*": "attention", "-": "MLP"}

Violation = tuple[str, object, str, str]


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """Language model of single-sublayer residual layers, one per symbol of ``pattern`` (arXiv 2406.07887).

    Attributes:
        pattern: ``M`` Mamba-2, ``*`` attention, ``-`` MLP, first layer first.
        width: features of the residual stream.
        vocab_size: rows of the embedding.
        max_sequence_length: longest sequence to train on, in tokens; None for no limit.
        num_heads, num_kv_heads: query and key/value heads of attention (None: as many as query heads).
        head_dim: features of an attention head (None: width / num_heads).
        rope_theta: base of the rotary position embedding; None for no position embedding.
        mamba_head_dim, mamba_state_dim: features and state size of a Mamba-2 head.
        mamba_groups: groups of heads that share B and C.
        mamba_expand: inner width of Mamba-2 as a multiple of ``width``.
        mamba_conv_kernel: taps of the causal convolution.
        mamba_chunk_size: chunk length of the SSD algorithm, in tokens (speed only, not the result).
        mlp_ratio: hidden features of an MLP as a multiple of ``width``, used when ``mlp_hidden_size`` is
            None.
        mlp_activation: ``swiglu`` (gated, three matrices), ``gelu`` or ``relu2`` (squared ReLU).
        norm_eps: added to the mean square in RMSNorm.
        tied_embeddings: the output head is the embedding matrix.
        init_std: standard deviation of embedding and projection weights at the start; output projections of
            the sublayers get ``init_std / sqrt(number of layers)``.
    """

    pattern: str
    width: int
    vocab_size: int
    max_sequence_length: int | None = None
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    mamba_head_dim: int = 64
    mamba_state_dim: int = 128
    mamba_groups: int = 1
    mamba_expand: int = 2
    mamba_conv_kernel: int = 4
    mamba_chunk_size: int = 128
    mlp_ratio: float = 4.0
    mlp_hidden_size: int | None = None
    mlp_activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    norm_eps: float = 1e-5
    tied_embeddings: bool = True
    init_std: float = 0.02

    @property
    def num_layers(self) -> int:
        """Sublayers, one for each symbol of the pattern."""
        return len(self.pattern)

    @property
    def attention_kv_heads(self) -> int:
        """Key/value heads, default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def attention_head_dim(self) -> int:
        """Features of an attention head, default filled in."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mamba_inner(self) -> int:
        """Inner width of a Mamba-2 mixer (all heads together)."""
        return self.mamba_expand * self.width

    @property
    def mamba_heads(self) -> int:
        """Heads of a Mamba-2 mixer."""
        return self.mamba_inner // self.mamba_head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden features of an MLP, default filled in."""
        return round(self.mlp_ratio * self.width) if self.mlp_hidden_size is None else self.mlp_hidden_size

    def violations(self) -> Iterator[Violation]:
        """Every broken rule as (field, found, rule, fix). Fields of a layer kind that the pattern lacks are
        not judged.
        """
        yield from self._pattern_violations()
        broken = dict.fromkeys(name for name in self._positive_fields() if getattr(self, name) <= 0)
        for name in broken:
            yield (
                name,
                getattr(self, name),
                "must be positive",
                f"set a positive value, for example {self._example(name)}",
            )
        if "*" in self.pattern and not broken.keys() & {"width", "num_heads", "num_kv_heads", "head_dim"}:
            yield from self._attention_violations()
        if "M" in self.pattern and not broken.keys() & {
            "width",
            "mamba_expand",
            "mamba_head_dim",
            "mamba_groups",
        }:
            yield from self._mamba_violations()

    def parallel_violations(
        self, tensor_parallel: int, sequence_parallel: bool, sequence_length: int | None
    ) -> Iterator[Violation]:
        """Every reason why ``tensor_parallel`` ranks cannot share this (otherwise valid) model, as in
        :meth:`violations`. ``sequence_length``: tokens of a training sequence, None if unknown.
        """
        ranks = f"the {tensor_parallel} tensor-parallel ranks"
        if tensor_parallel == 1:
            return
        counts = {"vocab_size": self.vocab_size}
        if "*" in self.pattern:
            counts |= {"num_heads": self.num_heads, "num_kv_heads": self.attention_kv_heads}
        if "-" in self.pattern:
            counts["mlp_hidden_size"] = self.mlp_hidden
        if "M" in self.pattern:
            counts["mamba_groups"] = self.mamba_groups
        for field, count in counts.items():
            if count % tensor_parallel:
                larger = -(-count // tensor_parallel) * tensor_parallel
                fix = f"set {field} to {larger}, or fewer tensor-parallel ranks"
                if field == "mamba_groups" and count == 1:
                    fix += " (a single group is normalised as a whole and would need an exchange in every layer)"
                yield field, count, f"must be a multiple of {ranks}, each of which holds an equal share", fix
        if "M" in self.pattern and self.mamba_heads % tensor_parallel:
            heads = f"{self.mamba_heads} = mamba_expand * width / mamba_head_dim"
            rule = f"the number of Mamba-2 heads ({heads}) must be a multiple of {ranks}"
            yield "mamba_head_dim", self.mamba_head_dim, rule, "change width or mamba_head_dim, or use fewer ranks"
        if sequence_parallel and sequence_length is not None and sequence_length % tensor_parallel:
            larger = -(-sequence_length // tensor_parallel) * tensor_parallel
            fix = f"set the sequence length to {larger}, or sequence_parallel to false"
            yield "sequence_length", sequence_length, f"must be a multiple of {ranks} with sequence_parallel", fix

    def layer_costs(self, sequence_length: int) -> list[float]:
        """Forward FLOPs per token of each layer, first layer first, for balancing pipeline stages."""
        from pretrain.models.hybrid.cost import layer_cost

        return [layer_cost(self, symbol, sequence_length).flops_per_token for symbol in self.pattern]

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

    def _pattern_violations(self) -> Iterator[Violation]:
        known = ", ".join(f"'{symbol}' {kind}" for symbol, kind in SYMBOLS.items())
        if not self.pattern:
            yield (
                "pattern",
                self.pattern,
                f"needs one symbol for each layer ({known})",
                "for example 'M-M*-M-M-'",
            )
        unknown = "".join(sorted(set(self.pattern) - SYMBOLS.keys()))
        if unknown:
            kept = "".join(symbol for symbol in self.pattern if symbol in SYMBOLS)
            fix = f"remove {unknown!r}" + (f", for example {kept!r}" if kept else "")
            yield "pattern", self.pattern, f"symbols must be {known}", fix

    def _positive_fields(self) -> Iterator[str]:
        yield from ("width", "vocab_size", "norm_eps", "init_std")
        if self.max_sequence_length is not None:
            yield "max_sequence_length"
        if "*" in self.pattern:
            yield "num_heads"
            for name in ("num_kv_heads", "head_dim", "rope_theta"):
                if getattr(self, name) is not None:
                    yield name
        if "M" in self.pattern:
            for name in ("head_dim", "state_dim", "groups", "expand", "conv_kernel", "chunk_size"):
                yield f"mamba_{name}"
        if "-" in self.pattern:
            yield "mlp_ratio" if self.mlp_hidden_size is None else "mlp_hidden_size"

    def _example(self, name: str) -> object:
        default = type(self).__dataclass_fields__[name].default
        examples: dict[str, object] = {
            "width": 512,
            "vocab_size": 32768,
            "max_sequence_length": 4096,
            "num_kv_heads": self.num_heads,
            "head_dim": 64,
            "rope_theta": 10000.0,
            "mlp_hidden_size": 2048,
        }
        return examples.get(name, default)

    def _attention_violations(self) -> Iterator[Violation]:
        if self.head_dim is None and self.width % self.num_heads:
            fix = f"set {_nearest_divisors(self.width, self.num_heads)} heads, or set head_dim"
            yield (
                "num_heads",
                self.num_heads,
                f"must divide width ({self.width}) when head_dim is not set",
                fix,
            )
        elif self.rope_theta is not None and self.attention_head_dim % 2:
            found = self.attention_head_dim
            fix = f"set head_dim to {found + 1}, or rope_theta to null"
            yield "head_dim", found, "must be even with a rotary embedding (rope_theta)", fix
        if self.num_heads % self.attention_kv_heads:
            fix = f"set {_nearest_divisors(self.num_heads, self.attention_kv_heads)}"
            yield "num_kv_heads", self.attention_kv_heads, f"must divide num_heads ({self.num_heads})", fix

    def _mamba_violations(self) -> Iterator[Violation]:
        if self.mamba_inner % self.mamba_head_dim:
            fix = f"set {_nearest_divisors(self.mamba_inner, self.mamba_head_dim)}"
            rule = f"must divide mamba_expand * width ({self.mamba_inner})"
            yield "mamba_head_dim", self.mamba_head_dim, rule, fix
        elif self.mamba_heads % self.mamba_groups:
            fix = f"set {_nearest_divisors(self.mamba_heads, self.mamba_groups)}"
            heads = f"{self.mamba_heads} = mamba_expand * width / mamba_head_dim"
            rule = f"must divide the number of Mamba-2 heads ({heads})"
            yield "mamba_groups", self.mamba_groups, rule, fix


def _nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of ``number`` next to ``wanted`` on either side, as 'a or b'."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = max((d for d in divisors if d < wanted), default=None)
    above = min((d for d in divisors if d > wanted), default=None)
    return " or ".join(str(d) for d in (below, above) if d is not None)
