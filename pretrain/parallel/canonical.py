"""Canonical names: the logical tensors behind a module's parameters.

A module that stacks several logical tensors along dim 0 of one parameter declares ``canonical_components``
``{local parameter name: {component: rows}}``. Canonical state names each component by itself
(``layers.3.mixer.in_proj.z.weight``), so a checkpoint does not depend on how a layout packs or shards projections.
Because components are stacked along dim 0, each one is a contiguous flat range of the packed parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """One logical tensor inside a parameter: flat elements ``[start, stop)`` of it, row-major."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class CanonicalParameter:
    """A parameter of the module tree with its logical parts, which cover it without gap or overlap."""

    module_name: str
    tensor: nn.Parameter
    parts: tuple[Part, ...]

    def view(self, part: Part) -> Tensor:
        """The logical tensor ``part`` inside the stored parameter."""
        return self.tensor.data.view(-1)[part.start : part.stop].view(part.shape)


def _parts(module: nn.Module, prefix: str, local_name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    components = getattr(module, "canonical_components", {}).get(local_name)
    dotted = f"{prefix}." if prefix else ""
    if not components:
        return (Part(dotted + local_name, shape, 0, prod(shape)),)
    if (rows := sum(components.values())) != shape[0]:
        raise ValueError(
            f"{dotted}{local_name}: canonical_components {dict(components)} sum to {rows} rows, expected {shape[0]}; "
            "list every packed component with its number of rows"
        )
    row_numel = prod(shape[1:])
    parts, start = [], 0
    for component, num_rows in components.items():
        stop = start + num_rows * row_numel
        parts.append(Part(f"{dotted}{component}.{local_name}", (num_rows, *shape[1:]), start, stop))
        start = stop
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
            yield CanonicalParameter(name, parameter, _parts(module, prefix, local_name, tuple(parameter.shape)))


def canonical_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers of ``model`` by name."""
    for prefix, module in model.named_modules():
        for local_name, buffer in module._buffers.items():
            if buffer is not None and local_name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{local_name}" if prefix else local_name), buffer
