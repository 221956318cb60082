"""The architectures that can be exchanged, and which of them a ``config.json`` names. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.exchange.architecture import Architecture, ExchangeError
from pretrain.exchange.llama import LLAMA
from pretrain.exchange.mamba import MAMBA
from pretrain.exchange.mamba2 import MAMBA2
from pretrain.exchange.nemotron_h import NEMOTRON_H

ARCHITECTURES: dict[str, Architecture] = {a.model_type: a for a in (LLAMA, MAMBA, MAMBA2, NEMOTRON_H)}
"""By ``model_type``, in the order in which a model to be written is tried."""


def architecture_of(values: Mapping[str, Any]) -> Architecture:
    """The architecture of a ``config.json``.

    Raises:
        ExchangeError: it names another architecture, or none.
    """
    kind, classes = values.get("model_type"), values.get("architectures")
    known = ", ".join(f"{a.model_type} ({a.class_name})" for a in ARCHITECTURES.values())
    classes = [] if classes is None else classes
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ExchangeError(f"config.json: architectures = {classes!r}, expected a list of names of classes")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        named = f"model_type {kind!r}" + (f", architectures {classes}" if classes else "")
        raise ExchangeError(f"config.json: {named}, expected one of {known}")
    architecture = ARCHITECTURES[kind]
    if classes and architecture.class_name not in classes:
        raise ExchangeError(
            f"config.json: architectures {classes} of model_type {kind!r}, expected {architecture.class_name}; "
            f"known are {known}"
        )
    return architecture
