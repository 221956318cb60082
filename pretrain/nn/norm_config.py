"""Configuration and cost of the norms between layers. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.nn.cost import FP32, Cost
from pretrain.nn.mixer_config import Violation, not_positive


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Norms of the residual stream: before and after the layers, after the embedding, before the head.

    Attributes:
        eps: added to the mean square or the variance, also by norms inside mixers.
        kind: ``rms`` RMSNorm; ``layer`` LayerNorm with bias; ``layer1p`` LayerNorm with bias that stores its weight
            minus 1 (as NVIDIA's transformers).
        placement: around a sublayer f, ``pre`` x + f(N(x)); ``post`` N(x + f(x)), then no norm comes before the head;
            ``peri`` x + N_out(f(N_in(x))) (arXiv 2502.02732, usually with ``embedding``); ``gru`` a GRU of x and
            relu(f(N(x))) instead of their sum (arXiv 1910.06764), six matrices of width x width more.
        embedding: a norm after the embedding.
    """

    eps: float = 1e-5
    kind: Literal["rms", "layer", "layer1p"] = "rms"
    placement: Literal["pre", "post", "peri", "gru"] = "pre"
    embedding: bool = False

    @property
    def final(self) -> bool:
        """Whether a norm comes before the head. After ``post`` layers the stream is normalised already."""
        return self.placement != "post"

    def violations(self) -> Iterator[Violation]:
        """Every broken rule as (field, found, rule, fix)."""
        yield from not_positive(self, {"eps": 1e-5})

    def cost(self, width: int, bytes_per_value: int = 2) -> Cost:
        """One norm of values of ``bytes_per_value``. It keeps its input and one or two statistics for each token; its
        output counts where it is used.
        """
        with_bias = self.kind != "rms"
        kept = bytes_per_value * width + FP32 * (1 + with_bias)
        return Cost(width * (1 + with_bias), activation_bytes_per_token=kept)

    def layer_cost(self, width: int, bytes_per_value: int = 2, residual_bytes: int | None = None) -> Cost:
        """All that a layer has around its mixer. ``residual_bytes``: of a value of the residual stream."""
        outer = self.cost(width, residual_bytes or bytes_per_value)
        if self.placement == "gru":
            # Kept besides x: the mixer's output after relu, r, r x, z and h.
            return outer + Cost(6 * width**2 + width, 12.0 * width**2, 0, 5 * bytes_per_value * width)
        return outer + self.cost(width, bytes_per_value) if self.placement == "peri" else outer

    def end_cost(self, width: int, bytes_per_value: int = 2, residual_bytes: int | None = None) -> Cost:
        """The norms after the embedding and before the head."""
        total = self.cost(width, bytes_per_value) if self.embedding else Cost()
        return total + self.cost(width, residual_bytes or bytes_per_value) if self.final else total
