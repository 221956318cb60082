"""Canonical names: the logical tensors behind a module's parameters.

A module that stacks several logical tensors along dim 0 of one parameter declares ``canonical_components``
``{local parameter name: {component: rows}}``. Canonical state names each component by itself
(``layers.3.mixer.in_proj.z.weight``), so a checkpoint does not depend on how a layout packs or shards projections.
Because components are stacked along dim 0, each one is a contiguous flat range of the packed parameter.

A parameter that holds one tensor-parallel rank's share says so with :func:`mark_split`. Its parts then carry the shape
of the whole logical tensor and the shard of it that is stored here; a packed parameter is split component by component,
so that every rank holds its share of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from pretrain.parallel.shard import Shard


@dataclass(frozen=True)
class Split:
    """Part ``rank`` of ``size`` equal parts along ``dim``."""

    dim: int
    rank: int
    size: int


@dataclass(frozen=True)
class Part:
    """One logical tensor inside a parameter: flat elements ``[start, stop)`` of it, row-major.

    ``shape`` is that of the whole logical tensor, of which ``shard`` lies here.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    shard: Shard
    local_shape: tuple[int, ...]


@dataclass(frozen=True)
class CanonicalParameter:
    """A parameter of the module tree with its logical parts, which cover it without gap or overlap."""

    module_name: str
    tensor: nn.Parameter
    parts: tuple[Part, ...]

    def view(self, part: Part) -> Tensor:
        """What the stored parameter holds of the logical tensor ``part``, in its local shape."""
        return self.tensor.data.view(-1)[part.start : part.stop].view(part.local_shape)


def mark_split(parameter: nn.Parameter, split: Split) -> nn.Parameter:
    """Declare that ``parameter`` holds one share of each of its logical tensors; returns it."""
    parameter.canonical_split = split  # type: ignore[attr-defined]
    return parameter


def _part(name: str, local_shape: tuple[int, ...], start: int, split: Split | None) -> Part:
    stop = start + prod(local_shape)
    if split is None or split.size == 1:
        return Part(name, local_shape, start, stop, Shard.whole(local_shape), local_shape)
    shape = tuple(n * split.size if d == split.dim else n for d, n in enumerate(local_shape))
    return Part(name, shape, start, stop, Shard.split(shape, split.dim, split.rank, split.size), local_shape)


def _parts(module: nn.Module, prefix: str, local_name: str, parameter: nn.Parameter) -> tuple[Part, ...]:
    components = getattr(module, "canonical_components", {}).get(local_name)
    split = getattr(parameter, "canonical_split", None)
    # DeepSpeed's stage 3 leaves an empty tensor in place of a parameter and keeps its shape aside.
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    dotted = f"{prefix}." if prefix else ""
    if not components:
        return (_part(dotted + local_name, shape, 0, split),)
    if (rows := sum(components.values())) != shape[0]:
        raise ValueError(
            f"{dotted}{local_name}: canonical_components {dict(components)} sum to {rows} rows, expected {shape[0]}; "
            "list every packed component with its number of rows"
        )
    parts: list[Part] = []
    for component, num_rows in components.items():
        start = parts[-1].stop if parts else 0
        parts.append(_part(f"{dotted}{component}.{local_name}", (num_rows, *shape[1:]), start, split))
    return tuple(parts)


def canonical_parameters(model: nn.Module) -> Iterator[CanonicalParameter]:
    """Parameters of ``model`` in registration order, each once (tied parameters under their first name).

    Raises:
        ValueError: a module's ``canonical_components`` do not cover its parameter exactly, or name one it lacks.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        for unknown in getattr(module, "canonical_components", {}).keys() - own.keys():
            raise ValueError(
                f"{prefix or type(module).__name__}: canonical_components names '{unknown}', expected one of "
                f"{sorted(own)}; declare only parameters that the module registers itself"
            )
        for local_name, parameter in own.items():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{local_name}" if prefix else local_name
            yield CanonicalParameter(name, parameter, _parts(module, prefix, local_name, parameter))


def canonical_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers of ``model`` by name."""
    for prefix, module in model.named_modules():
        for local_name, buffer in module._buffers.items():
            if buffer is not None and local_name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{local_name}" if prefix else local_name), buffer
