"""What the configuration of a mixer offers, so that a model can hold any of them. Torch-free.

A mixer is two files: ``<mixer>_config.py`` (its fields, rules and cost, without torch) and ``<mixer>.py`` (the module).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pretrain.nn.cost import Cost

if TYPE_CHECKING:
    from pretrain.parallel.layers import ParallelLayers

Violation = tuple[str, object, str, str]
"""A broken rule: (field, found, rule, fix)."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a mixer stands in a model, and what it takes from there.

    Attributes:
        width: features of the residual stream.
        layer: index among the layers of the whole model, from 0.
        occurrence: index among the layers of the same kind, from 0.
        norm_eps: added to the mean square by norms inside the mixer.
    """

    width: int
    layer: int = 0
    occurrence: int = 0
    norm_eps: float = 1e-5


class MixerConfig(Protocol):
    """Fields, rules, cost and construction of one kind of layer."""

    label: ClassVar[str]
    """What it is called in tables and messages."""

    def violations(self, width: int, count: int) -> Iterator[Violation]:
        """Every broken rule; field names are the mixer's own. ``width``: of the residual stream (positive);
        ``count``: layers of this kind in the model.
        """
        ...

    def parallel_violations(self, width: int, tensor_parallel: int) -> Iterator[Violation]:
        """Every reason why so many (at least two) tensor-parallel ranks cannot share the otherwise valid mixer."""
        ...

    def cost(self, place: Place, sequence_length: int, bytes_per_value: int = 2) -> Cost:
        """Cost in sequences of ``sequence_length`` tokens, with parameters and activations of ``bytes_per_value``."""
        ...

    def build(self, layers: ParallelLayers, place: Place) -> Any:
        """The module, an ``nn.Module`` with the methods of :class:`pretrain.nn.block.Mixer`."""
        ...


def not_positive(config: object, examples: Mapping[str, object]) -> Iterator[Violation]:
    """A violation for each of the named fields that is set (not None) and not positive and finite."""
    for name, example in examples.items():
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            rule = "must be finite" if value == math.inf else "must be positive"
            default = type(config).__dataclass_fields__[name].default  # type: ignore[attr-defined]
            none = "" if default is not None else ", or null for the default"
            yield name, value, rule, f"set a positive number, for example {example}{none}"


def no_hidden_feature(config: Any, width: int) -> Iterator[Violation]:
    """A violation when the ``ratio`` of a feed-forward layer leaves nothing between its matrices."""
    if config.hidden_size is None and 0 < config.ratio < math.inf and config.hidden(width) < 1:
        rule = f"must leave at least one hidden feature at width {width}"
        yield "ratio", config.ratio, rule, "set a larger ratio, for example 4.0, or hidden_size"


def uneven_share(field: str, count: int, tensor_parallel: int, note: str = "") -> Iterator[Violation]:
    """A violation when the ranks cannot hold equal shares of ``count``."""
    if count % tensor_parallel:
        larger = -(-count // tensor_parallel) * tensor_parallel
        rule = f"must be a multiple of the {tensor_parallel} tensor-parallel ranks, each of which holds an equal share"
        yield field, count, rule, f"set {field} to {larger}, or fewer tensor-parallel ranks{note}"


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of ``number`` next to ``wanted`` on either side, as 'a or b'."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = max((d for d in divisors if d < wanted), default=None)
    above = min((d for d in divisors if d > wanted), default=None)
    return " or ".join(str(d) for d in (below, above) if d is not None)
