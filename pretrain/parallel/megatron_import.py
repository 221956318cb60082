"""Importing Megatron-Core: the one door, which checks the version and adapts it to hosts without CUDA.

Every module that uses ``megatron.core`` is imported after :func:`import_megatron` was called; nothing else in the
project imports it at module level except the modules named ``megatron_*``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import warnings

KNOWN_VERSIONS = ("0.16.1",)
"""Versions whose internals (optimizer state, and on CPU the places that name ``cuda``) were read and tested."""

# Everything of Megatron-Core that the engine runs; the CPU layer adapts what is loaded by then.
_MODULES = (
    "parallel_state",
    "tensor_parallel",
    "tensor_parallel.layers",
    "pipeline_parallel",
    "pipeline_parallel.schedules",
    "distributed",
    "distributed.finalize_model_grads",
    "optimizer",
    "optimizer.distrib_optimizer",
    "transformer.transformer_config",
    "transformer.module",
)


class MegatronVersionError(ValueError):
    """Megatron-Core is missing, or of a version that this release does not know."""


def check_version() -> str:
    """The installed version, without importing it.

    Raises:
        MegatronVersionError: not installed, or not one of :data:`KNOWN_VERSIONS`.
    """
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise MegatronVersionError(
            f"engine megatron: megatron-core is not installed; pip install megatron-core=={KNOWN_VERSIONS[-1]}, "
            "or choose engine=deepspeed"
        ) from None
    if version not in KNOWN_VERSIONS:
        raise MegatronVersionError(
            f"engine megatron: megatron-core {version} is installed, expected {' or '.join(KNOWN_VERSIONS)}: this "
            "release reads and writes optimizer internals that may differ there; "
            f"pip install megatron-core=={KNOWN_VERSIONS[-1]}, or choose engine=deepspeed"
        )
    return version


def prepare_environment() -> None:
    """Variables that CUDA reads once, when a process first uses the device. Changes nothing that is set already."""
    # Megatron's overlap of sequence-parallel communication relies on one hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def import_megatron(device_type: str) -> None:
    """Import the parts of Megatron-Core that the engine runs, quiet, adapted to CPU where ``device_type`` is ``cpu``.

    Raises:
        MegatronVersionError: see :func:`check_version`.
    """
    check_version()
    from pretrain.parallel.late_compiler import compiled_at_first_call  # here: the check of a version loads no torch

    if device_type == "cuda":
        prepare_environment()
    logging.getLogger("megatron").setLevel(logging.WARNING)
    # Advice on libraries that are absent here, and on torch's coming names for collectives: nothing a user can act on.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
    with warnings.catch_warnings(), compiled_at_first_call():
        warnings.simplefilter("ignore")
        modules = [importlib.import_module(f"megatron.core.{name}") for name in _MODULES]
    assert modules
    if device_type == "cpu":
        from pretrain.parallel import megatron_cpu

        megatron_cpu.adapt()
