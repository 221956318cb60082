"""Configuration, rules and cost of attention. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pretrain.nn.cost import FP32, Cost, linear_cost
from pretrain.nn.mixer_config import Place, Violation, nearest_divisors, not_positive, uneven_share

if TYPE_CHECKING:
    from pretrain.nn.attention import Attention
    from pretrain.parallel.layers import ParallelLayers


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies for longer texts; see :func:`pretrain.nn.rope.scaled_frequencies`. Fields as in Hugging Face's
    ``rope_scaling``.

    Attributes:
        kind: ``llama3`` or ``linear``.
        factor: what frequencies are divided by.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: read by ``llama3`` only.
    """

    kind: Literal["llama3", "linear"]
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def violations(self) -> Iterator[Violation]:
        """Every broken rule as (field, found, rule, fix)."""
        yield from not_positive(self, {"factor": 8.0})
        if self.kind != "llama3":
            return
        yield from not_positive(self, {"low_freq_factor": 1.0, "original_max_position_embeddings": 8192})
        if not self.high_freq_factor > self.low_freq_factor:
            fix = f"set a larger value, for example {4 * self.low_freq_factor}"
            rule = f"must be above low_freq_factor ({self.low_freq_factor})"
            yield "high_freq_factor", self.high_freq_factor, rule, fix


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal grouped-query attention within documents (Ainslie et al., arXiv 2305.13245).

    Attributes:
        num_heads, num_kv_heads: query and key/value heads (None: as many as query heads).
        head_dim: features of a head (None: width / num_heads).
        rope_theta: base of the rotary position embedding; None for no position embedding.
        rope_fraction: share of a head's features that are rotated, the first ones, rounded down
            (``partial_rotary_factor`` in Hugging Face configurations).
        rope_scaling: rotary frequencies for longer texts; None for none.
        qkv_bias, out_bias: biases of the projections.
        qk_norm: RMSNorm of every query and key head over its features, before the rotary embedding (Dehghani et al.,
            arXiv 2302.05442; as in Qwen 3).
        windows: tokens that a query of each attention layer sees, itself included, so that W is itself and the W - 1
            tokens before it within its document; None for the whole document before it. One entry for each attention
            layer in order, repeated from the first; empty for no windows.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118); None for plain scores.
        clip_gamma, clip_zeta: weights w become clip((zeta - gamma) w + gamma, 0, 1) after the softmax (Bondarenko et
            al., arXiv 2306.12929); gamma <= 0, for example -0.025, or -12 / sequence length; None for plain softmax.
        gate: factor of the attention output before the output projection, sigmoid(linear(input)): ``head``, one for
            each head, 0.25 at the start (arXiv 2306.12929); ``feature``, one for each feature, with a bias where
            ``qkv_bias`` (as in Qwen3-Next); ``none``.
    """

    label: ClassVar[str] = "attention"

    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    softcap: float | None = None
    clip_gamma: float | None = None
    clip_zeta: float = 1.0
    gate: Literal["none", "head", "feature"] = "none"

    @property
    def kv_heads(self) -> int:
        """Key/value heads, default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def features(self, width: int) -> int:
        """Features of a head, default filled in."""
        return width // self.num_heads if self.head_dim is None else self.head_dim

    def rotary_features(self, width: int) -> int:
        """Features of a head that are rotated."""
        return 0 if self.rope_theta is None else int(self.features(width) * self.rope_fraction)

    def window(self, occurrence: int) -> int | None:
        """Tokens that a query of this attention layer (from 0) sees; None for no limit."""
        return self.windows[occurrence % len(self.windows)] if self.windows else None

    def violations(self, width: int, count: int) -> Iterator[Violation]:
        """See :class:`pretrain.nn.mixer_config.MixerConfig`."""
        examples = {
            "num_heads": 8,
            "num_kv_heads": self.num_heads,
            "head_dim": 64,
            "rope_theta": 10000.0,
            "softcap": 50.0,
        }
        broken = {violation[0]: violation for violation in not_positive(self, examples)}
        yield from broken.values()
        yield from self._option_violations(count)
        if broken.keys() & {"num_heads", "num_kv_heads", "head_dim"}:
            return
        if self.head_dim is None and width % self.num_heads:
            fix = f"set {nearest_divisors(width, self.num_heads)} heads, or set head_dim"
            yield "num_heads", self.num_heads, f"must divide width ({width}) when head_dim is not set", fix
        elif self.rope_theta is not None and 0 < self.rope_fraction <= 1:
            yield from self._rotary_violations(width)
        if self.num_heads % self.kv_heads:
            fix = f"set {nearest_divisors(self.num_heads, self.kv_heads)}"
            yield "num_kv_heads", self.kv_heads, f"must divide num_heads ({self.num_heads})", fix

    def parallel_violations(self, width: int, tensor_parallel: int) -> Iterator[Violation]:
        """Heads are split."""
        yield from uneven_share("num_heads", self.num_heads, tensor_parallel)
        yield from uneven_share("num_kv_heads", self.kv_heads, tensor_parallel)

    def cost(self, place: Place, sequence_length: int, bytes_per_value: int = 2) -> Cost:
        """Projections, and scores and weighted values of every query against as many keys as its window or the sequence
        holds, with no half deducted for later keys.

        Activation bytes are those of one document a row on CPU, see :meth:`_kept`; a cache holds the keys and values of
        the window.
        """
        heads, features, width = self.num_heads, self.features(place.width), place.width
        columns = (heads + 2 * self.kv_heads) * features
        total = linear_cost(width, columns, self.qkv_bias) + linear_cost(heads * features, width, self.out_bias)
        if self.gate == "head":
            total += linear_cost(width, heads, bias=True)
        elif self.gate == "feature":
            total += linear_cost(width, heads * features, self.qkv_bias)
        if self.qk_norm:
            total += Cost(2 * features)
        window = self.window(place.occurrence)
        seen = sequence_length if window is None else min(window, sequence_length)
        blocked = seen < sequence_length or self.softcap is not None or self.clip_gamma is not None
        kept = self._kept(width, bytes_per_value, blocked)
        state = 2 * self.kv_heads * features * seen * bytes_per_value
        flops = 4 * seen * heads * features
        return total + Cost(flops_per_token=flops, activation_bytes_per_token=kept, state_bytes=state)

    def build(self, layers: ParallelLayers, place: Place) -> Attention:
        """The module."""
        from pretrain.nn.attention import Attention

        return Attention(layers, place, self)

    def _option_violations(self, count: int) -> Iterator[Violation]:
        """What options ask for by themselves."""
        if not 0 < self.rope_fraction <= 1:
            yield "rope_fraction", self.rope_fraction, "must be above 0 and at most 1", "set 1.0, or 0.5 for a half"
        if self.rope_theta is None:
            fix = "set rope_theta, for example 10000.0"
            if self.rope_fraction != 1:
                yield "rope_fraction", self.rope_fraction, "needs a rotary embedding (rope_theta)", f"{fix}, or 1.0"
            if self.rope_scaling is not None:
                kind = self.rope_scaling.kind
                yield "rope_scaling", kind, "needs a rotary embedding (rope_theta)", f"{fix}, or rope_scaling to null"
        if self.rope_scaling is not None:
            for field, found, rule, fix in self.rope_scaling.violations():
                yield f"rope_scaling.{field}", found, rule, fix
        if any(window is not None and window < 1 for window in self.windows):
            rule = "must hold positive numbers of tokens, or null for all"
            yield "windows", list(self.windows), rule, "set each at least to 1 (the token itself), or to null"
        if len(self.windows) > max(count, 1):
            rule = f"must not have more entries than the model has attention layers ({count})"
            yield "windows", list(self.windows), rule, f"keep {max(count, 1)} of them"
        if self.clip_gamma is not None and not -math.inf < self.clip_gamma <= 0:
            rule = "must be 0 or less, so that hidden keys keep the weight 0, and finite"
            fix = f"set {-self.clip_gamma if 0 < self.clip_gamma < math.inf else -0.025}, or null for plain softmax"
            yield "clip_gamma", self.clip_gamma, rule, fix
        if not 1 <= self.clip_zeta < math.inf:
            yield "clip_zeta", self.clip_zeta, "must be at least 1 and finite", "set 1.0"
        elif self.clip_gamma is None and self.clip_zeta != 1:
            fix = "set clip_gamma to 0.0, or clip_zeta to 1.0"
            yield "clip_zeta", self.clip_zeta, "is read with clip_gamma only, which is null", fix

    def _rotary_violations(self, width: int) -> Iterator[Violation]:
        features, turned = self.features(width), self.rotary_features(width)
        if self.rope_fraction == 1 and features % 2:
            fix = f"set head_dim to {features + 1}, or rope_theta to null"
            yield "head_dim", features, "must be even with a rotary embedding (rope_theta)", fix
        elif turned < 2 or turned % 2:
            rule = f"must leave an even number of a head's {features} features to rotate, found {turned}"
            yield "rope_fraction", self.rope_fraction, rule, f"set {max(2, turned + turned % 2) / features}"

    def _kept(self, width: int, bytes_per_value: int, blocked: bool) -> float:
        """Bytes that autograd keeps for each token.

        Scaled dot product attention keeps queries, keys and values as parts of larger tensors, and a normaliser for
        each head; the blocked way keeps its own copies of them and no normalisers.
        """
        heads, kv_heads, features = self.num_heads, self.kv_heads, self.features(width)
        turned = (heads + kv_heads) * features
        values = width + (heads + 2 * kv_heads) * features + heads * features
        statistics = 0
        if not blocked:
            statistics += heads
            values += turned if self.rope_theta is not None or self.qk_norm else 0
        if self.qk_norm:
            values += turned
            statistics += heads + kv_heads
        if self.gate != "none":
            values += heads * features + (heads if self.gate == "head" else heads * features)
        return bytes_per_value * values + FP32 * statistics
