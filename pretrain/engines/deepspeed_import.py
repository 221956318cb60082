"""Importing DeepSpeed without its side effects.

On a CPU host DeepSpeed compiles a shared-memory communication operator when the process group starts: 43 s cold, and an
error without a C++ compiler or ``ninja``. It asks ``deepspeed.ops.__compatible_ops__`` first, and computes that table
on first access; presetting it to "nothing is available" keeps every compile-at-first-use operator switched off.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any


def import_deepspeed(device_type: str) -> Any:
    """The ``deepspeed`` module, quiet, with compile-at-first-use operators off on CPU hosts."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # torch renamed the collectives that ZeRO calls in every step, and would say so as often.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device_type == "cpu":
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed
