"""A mixer's stated cost against its real module: ``check_cost(config, width)`` in the mixer's own tests.

What is measured, on CPU, for the module that ``config.build`` makes:

- parameters: elements of all parameters. Exact.
- FLOPs: those that torch's ``FlopCounterMode`` sees in a forward pass, attention by the MATH back end (the counter does
  not know the fused one). Exact.
- activation bytes: storages that autograd keeps for the backward pass (seen by ``saved_tensors_hooks``), without
  parameters. A storage counts once and whole, however many views or slices of it are kept. Taken as the difference
  between passes with two and with one sequence, so what does not grow with the batch (rotary tables, converted weights)
  is left out. The input of the mixer is a tensor of its own, so it counts where the mixer's first layer keeps it.
  Tensors that a custom autograd function puts on ``ctx`` instead of ``save_for_backward`` are not seen.
- state bytes: tensors in the generation cache of one sequence after a prompt of n tokens. In a tensor whose name's
  shape suffix has an S (cached positions, as ``_keys_BJSP``) only the positions in use count, not the capacity of the
  buffer: the cache tells them as ``kept`` or, without that, ``length``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.nn.cost import Cost
from pretrain.nn.initialisation import initialise
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mixer_config import MixerConfig, Place
from pretrain.parallel.layers import TorchLayers


def check_cost(
    config: MixerConfig,
    width: int,
    *,
    length: int = 48,
    batch_size: int = 2,
    dtype: torch.dtype = torch.float32,
    state_lengths: Sequence[int] = (1, 5, 40),
    activation_tolerance: float = 0.0,
    occurrence: int = 0,
) -> Cost:
    """Assert that the cost of ``config`` is what its module does, in ``dtype``, and return what was measured.

    Args:
        length, batch_size: tokens of the training pass. The length of the chunks of a chunked algorithm should divide
            ``length``, as costs do not count padding.
        state_lengths: prompts after which the generation state is measured; the returned cost has that of the last.
        activation_tolerance: relative difference allowed for activation bytes.
        occurrence: which of the layers of its kind this is.
    """
    place = Place(width=width, occurrence=occurrence)
    module = build(config, place).to(dtype)
    stated = config.cost(place, length, dtype.itemsize)
    states = {tokens: state_bytes(module, width, tokens) for tokens in state_lengths}
    measured = Cost(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        flops_per_token=forward_flops(module, width, length, batch_size) / (length * batch_size),
        idle_parameters=stated.idle_parameters,
        activation_bytes_per_token=activation_bytes_per_token(module, width, length),
        state_bytes=states[state_lengths[-1]],
    )
    allowed = {
        "parameters": 0.0,
        "flops_per_token": 1e-12,  # of rounding: sums over whole sequences, divided
        "activation_bytes_per_token": max(activation_tolerance, 1e-12),
    }
    for field, tolerance in allowed.items():
        found, expected = getattr(measured, field), getattr(stated, field)
        assert abs(expected - found) <= tolerance * found, f"{field}: stated {expected}, measured {found}"
    stated_states = {tokens: config.cost(place, tokens, dtype.itemsize).state_bytes for tokens in state_lengths}
    assert stated_states == states, f"state_bytes after so many tokens: stated {stated_states}, measured {states}"
    return measured


def build(config: MixerConfig, place: Place) -> nn.Module:
    """The initialised module of a valid configuration."""
    faults = list(config.violations(place.width, place.occurrence + 1))
    assert not faults, faults
    module: nn.Module = config.build(TorchLayers(), place)
    initialise(module, module.initialisers(0.02, 0.02), seed=0)  # type: ignore[operator]
    return module


def forward_flops(module: nn.Module, width: int, length: int, batch_size: int) -> int:
    """FLOPs of one training forward pass."""
    counter = FlopCounterMode(display=False)
    x_LBD = _hidden(module, width, length, batch_size)
    with counter, sdpa_kernel(SDPBackend.MATH):
        module(x_LBD, _layout(length, batch_size))
    return int(counter.get_total_flops())


def activation_bytes_per_token(module: nn.Module, width: int, length: int) -> float:
    """What one more sequence adds to what autograd keeps, over its tokens."""
    kept = []
    for batch_size in (1, 2):
        x_LBD = _hidden(module, width, length, batch_size)
        with measured_saves(module) as saves:
            module(x_LBD, _layout(length, batch_size))
        kept.append(saves.total_bytes)
    return (kept[1] - kept[0]) / length


class Saves:
    """Storages that autograd keeps, each once."""

    def __init__(self, parameters: set[int]) -> None:
        self._excluded = parameters
        self._tensors: dict[int, Tensor] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes of all storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())

    def __call__(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self._excluded:
            self._tensors[pointer] = tensor  # held, so that no other storage takes its address
        return tensor


@contextlib.contextmanager
def measured_saves(module: nn.Module) -> Iterator[Saves]:
    """Collect what autograd keeps in the block, without the parameters of ``module``."""
    saves = Saves({parameter.untyped_storage().data_ptr() for parameter in module.parameters()})
    with saved_tensors_hooks(saves, lambda tensor: tensor):
        yield saves


@torch.no_grad()
def state_bytes(module: nn.Module, width: int, tokens: int) -> int:
    """Bytes in the cache of one sequence after a prompt."""
    x_LBD = _hidden(module, width, tokens, 1).detach()
    cache = module.init_cache(1, x_LBD.dtype, x_LBD.device)  # type: ignore[operator]
    module(x_LBD, _layout(tokens, 1), cache)
    return cache_bytes(cache)


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors in a generation cache (nested objects and lists too), positions in use only."""
    if cache is None:
        return 0
    if isinstance(cache, list | tuple):
        return sum(map(cache_bytes, cache))
    total = 0
    for name, value in vars(cache).items():
        if isinstance(value, Tensor):
            sizes = list(value.shape)
            suffix = name.rpartition("_")[2]
            if "S" in suffix:
                assert len(suffix) == value.ndim, f"{name}: {value.ndim} dimensions"
                dim = suffix.index("S")
                sizes[dim] = min(sizes[dim], cache.kept if hasattr(cache, "kept") else cache.length)
            total += torch.Size(sizes).numel() * value.element_size()
        elif isinstance(value, list | tuple) or hasattr(value, "__dict__"):
            total += cache_bytes(value)
    return total


def _hidden(module: nn.Module, width: int, length: int, batch_size: int) -> Tensor:
    """Hidden states that need a gradient, and are no leaf, as in a model; in the dtype of the parameters."""
    generator = torch.Generator().manual_seed(length)
    dtype = next(module.parameters()).dtype
    leaf = torch.randn(length, batch_size, width, generator=generator).to(dtype).requires_grad_()
    return leaf * 1


def _layout(length: int, batch_size: int) -> SequenceLayout:
    return SequenceLayout(length, batch_size, torch.device("cpu"))
