"""What one architecture of Hugging Face tells the exchange: its settings and its tensors. Torch-free.

A module for each architecture offers an :class:`Architecture`. Reading goes from ``config.json`` to the fields of
:class:`pretrain.models.hybrid.config.HybridConfig`, as a plain tree; writing goes the other way. Whether a model *is*
of an architecture is not judged by a list of options: what was written is read again, and every field that comes back
different is a reason (see :mod:`pretrain.exchange.model_config`). So an option that a mixer gets later is refused until
its architecture learns it, and never dropped silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.exchange.keys import current_names
from pretrain.models.hybrid.config import HybridConfig

Tree = dict[str, Any]
"""Fields of a configuration as plain nested dicts."""

MOST = 2**31 - 1
"""Largest size taken seriously; :data:`MOST_LAYERS` is the largest depth. A wrong file must not fill the memory."""
MOST_LAYERS = 100_000


class ExchangeError(ValueError):
    """A folder or a model cannot be exchanged; the message lists every reason."""


@dataclass(frozen=True)
class Link:
    """Tensors of theirs that hold the same numbers, in row-major order, as tensors of ours.

    ``rows``: ours stacked along the first dimension are theirs (one packed projection; mostly one to one).
    ``convolution``: the same, with a dimension of 1 before the last in theirs (a depthwise ``nn.Conv1d``).
    ``stack``: theirs, one for each index of the first dimension of ours (a matrix for each expert).
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    kind: Literal["rows", "convolution", "stack"] = "rows"

    def their_shape(self, our_shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of each of theirs."""
        shapes = [our_shapes[name] for name in self.ours]
        if self.kind == "stack":
            return shapes[0][1:]
        rows, rest = sum(shape[0] for shape in shapes), shapes[0][1:]
        return (rows, 1, *rest) if self.kind == "convolution" else (rows, *rest)


def link(theirs: str, *ours: str, kind: Literal["rows", "convolution"] = "rows") -> Link:
    """One tensor of theirs that packs ours."""
    return Link((theirs,), ours, kind)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One class of ``transformers``.

    Attributes:
        model_type, class_name: as in ``config.json``.
        defaults: every key that the class knows, with the value that counts when the file leaves it out.
        neutral: those of them that do not change what the model computes.
        aliases: other spellings that the class understands, and the keys of ``defaults`` that they stand for.
        read: settings to the fields of our configuration.
        write: our configuration to settings, as far as they can express it.
        links: the tensors of a model; head and embedding are left to the caller.
        embedding, head: names of theirs.
        ties: whether the class can use the embedding as head. Where it cannot, a tied model is written with a copy.
        zeros: tensors of theirs that must be all zero, for we have nothing like them; name and shape.
        absent: whether a file may hold a tensor of this name that is not read.
        prefixes: of the names of theirs; the first is written, any is read.
    """

    model_type: str
    class_name: str
    defaults: Mapping[str, Any]
    neutral: frozenset[str]
    read: Callable[[Settings], Tree]
    write: Callable[[HybridConfig], Tree]
    links: Callable[[HybridConfig], Iterator[Link]]
    embedding: str
    head: str = "lm_head.weight"
    ties: bool = True
    zeros: Callable[[HybridConfig], Mapping[str, tuple[int, ...]]] = lambda config: {}
    absent: Callable[[str], bool] = lambda name: False
    prefixes: tuple[str, ...] = ("",)
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Settings:
    """A ``config.json`` being read: values with defaults, and the faults and notes met on the way."""

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    class_name: str
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        return self.values[key] if key in self.values else self.defaults[key]

    def whole(self, key: str, most: int = MOST) -> int:
        """A whole number above 0, up to ``most``; a fault, and 1 in its place, for anything else."""
        value = self[key]
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
            return value
        self.fault(key, f"a whole number above 0, up to {most}")
        return 1

    def layers(self, key: str = "num_hidden_layers") -> int:
        """The number of layers."""
        return self.whole(key, MOST_LAYERS)

    def number(self, key: str) -> float:
        """A finite number."""
        value = as_number(self[key])
        if value is not None and math.isfinite(value):
            return value
        self.fault(key, "a finite number")
        return 1.0

    def flag(self, key: str) -> bool:
        """True or false."""
        if isinstance(self[key], bool):
            return bool(self[key])
        self.fault(key, "true or false")
        return False

    def only(self, key: str, *allowed: Any) -> None:
        """A fault unless the value is one of those that our model computes."""
        if self[key] not in allowed:
            shown = " or ".join(map(repr, allowed))
            self.fault(key, f"{shown}: this platform has no other {self.class_name}")

    def only_layers(self, *kinds: str) -> None:
        """A fault unless ``layer_types``, where the file has them, are all of these kinds."""
        found = current_names(self["layer_types"])
        if found is not None and not (isinstance(found, list) and all(kind in kinds for kind in found)):
            self.fault("layer_types", f"only {' or '.join(kinds)}: this platform has no other {self.class_name}")

    def fault(self, key: str, expected: str) -> None:
        """Report the value of a key."""
        self.faults.append(f"config.json: {key} = {self[key]!r}, expected {expected}")


def as_number(value: Any) -> float | None:
    """A number, perhaps infinite, that a float can hold; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def step_limit(settings: Settings, key: str = "time_step_limit") -> tuple[float, float] | None:
    """Limits of the step sizes of state-space layers; None for (0, infinity)."""
    limits = settings[key]
    found = [as_number(limit) for limit in limits] if isinstance(limits, list | tuple) else []
    if len(found) != 2 or found[0] is None or found[1] is None or math.isnan(found[0]) or math.isnan(found[1]):
        settings.fault(key, "two numbers, lowest and highest step")
        return None
    return None if (found[0] <= 0 and found[1] == math.inf) else (found[0], found[1])
