"""Linear and embedding builders: the one place where a layer says how it is split over devices.

A mixer asks its ``ParallelLayers`` for a column-parallel projection (output features split), a row-parallel
one (input features split, outputs summed) or a fused column-parallel one (several logical projections stored
in one matrix). :class:`TorchLayers` answers with plain ``torch.nn`` modules, that is, one device or data
parallelism only.

*Canonical* names address logical tensors: a module that packs several of them along dim 0 of one parameter
declares ``canonical_components = {local parameter name: {component: rows}}``, and component ``z`` of
``layers.3.mixer.in_proj.weight`` is called ``layers.3.mixer.in_proj.z.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


class ParallelLayers(Protocol):
    """Builder of the layers that a parallel layout may split. Sizes count features of the whole model."""

    def column(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module:
        """Linear [..., d_in] -> [..., d_out], output features split."""
        ...

    def row(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module:
        """Linear [..., d_in] -> [..., d_out], input features split."""
        ...

    def fused_column(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> nn.Module:
        """Several column-parallel linears in one matrix; the outputs are concatenated in the order given."""
        ...

    def embedding(self, vocab_size: int, width: int) -> nn.Embedding:
        """Lookup table: int [...] -> [..., width]."""
        ...


class FusedLinear(nn.Linear):
    """Linear layer whose output rows are named components: [..., d_in] -> [..., sum of components]."""

    def __init__(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> None:
        super().__init__(d_in, sum(components.values()), bias=bias)
        names = ["weight", "bias"] if bias else ["weight"]
        self.canonical_components = {name: dict(components) for name in names}


class TorchLayers:
    """Unsplit layers: plain ``torch.nn`` modules."""

    def column(self, d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
        return _exempt_bias(nn.Linear(d_in, d_out, bias=bias))

    def row(self, d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
        return _exempt_bias(nn.Linear(d_in, d_out, bias=bias))

    def fused_column(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> FusedLinear:
        layer = FusedLinear(d_in, components, bias=bias)
        _exempt_bias(layer)
        return layer

    def embedding(self, vocab_size: int, width: int) -> nn.Embedding:
        return nn.Embedding(vocab_size, width)


def exempt_from_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter so that optimizers do not decay it; returns the parameter."""
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def _exempt_bias(layer: nn.Linear) -> nn.Linear:
    if layer.bias is not None:
        exempt_from_weight_decay(layer.bias)
    return layer


@dataclass(frozen=True)
class CanonicalSlice:
    """One logical tensor: rows ``[start, start + rows)`` of dim 0 of a stored parameter.

    ``component`` is None when the parameter holds nothing else; then the slice is the whole parameter, also a
    scalar one.
    """

    name: str
    parameter_name: str
    parameter: nn.Parameter
    component: str | None
    start: int
    rows: int

    @property
    def tensor(self) -> Tensor:
        """View of the logical tensor inside the stored parameter."""
        if self.component is None:
            return self.parameter
        return self.parameter.narrow(0, self.start, self.rows)


def canonical_slices(module: nn.Module) -> Iterator[CanonicalSlice]:
    """Yield every logical tensor of ``module`` once, in registration order; a tied one at its first name.

    Raises:
        ValueError: if a module's ``canonical_components`` do not cover its parameter exactly, or name one it
            lacks.
    """
    seen: set[int] = set()
    for module_name, owner in module.named_modules():
        packed: dict[str, dict[str, int]] = getattr(owner, "canonical_components", {})
        own = dict(owner.named_parameters(recurse=False))
        for local in packed.keys() - own.keys():
            raise ValueError(
                f"{module_name or type(owner).__name__}: canonical_components names '{local}', expected one "
                f"of {sorted(own)}; declare only parameters that the module registers itself"
            )
        prefix = f"{module_name}." if module_name else ""
        for local, parameter in own.items():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield from _slices_of(prefix, local, parameter, packed.get(local))


def _slices_of(
    prefix: str, local: str, parameter: nn.Parameter, components: Mapping[str, int] | None
) -> Iterator[CanonicalSlice]:
    name = f"{prefix}{local}"
    if components is None:
        rows = parameter.shape[0] if parameter.dim() else 1
        yield CanonicalSlice(name, name, parameter, None, 0, rows)
        return
    if sum(components.values()) != parameter.shape[0]:
        raise ValueError(
            f"{name}: canonical_components {dict(components)} sum to {sum(components.values())} rows, "
            f"expected {parameter.shape[0]}; list every packed component with its number of rows"
        )
    start = 0
    for component, rows in components.items():
        yield CanonicalSlice(f"{prefix}{component}.{local}", name, parameter, component, start, rows)
        start += rows
