"""Trace of a run: what every rank computed, step by step, in a form that other layouts can be compared with."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from launchers.run_dir import trace_file
from pretrain.checkpoint.digest import MODULUS, fragment_digest
from pretrain.training.batches import SAMPLE_IDS
from pretrain.training.callback import Callback
from pretrain.training.loop import Trainer
from pretrain.training.state import StepRecord


class TraceCallback(Callback):
    """Appends one JSON line a step to this rank's file in ``path``, the folder of one attempt.

    A line with event ``start`` holds the state before the first step of the attempt, after a checkpoint was loaded. A
    line with event ``step`` holds the ids of this rank's samples, the digest of torch's generators as the step's last
    micro-batch left them, loss and gradient norm (floats as JSON, which keeps every bit), the optimizer's scalars and
    ``state``: the digest of this rank's share of every logical tensor (:mod:`pretrain.checkpoint.digest`), by
    ``slot:name``. Register it before callbacks that may draw random numbers.
    """

    name = "trace"

    def __init__(self, path: Path, rank: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        # Unbuffered: every line reaches the system whole, and outlives a rank that is killed.
        self._descriptor = os.open(trace_file(path, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._rank = rank

    def on_start(self, trainer: Trainer) -> None:
        self._write(trainer, "start")

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._write(
            trainer,
            "step",
            leader=trainer.engine.is_data_leader,
            sample_ids=[int(i) for batch in trainer.host_batches for i in batch[SAMPLE_IDS]],
            rng=generator_digest(trainer.engine.device),
            loss=record.loss,
            grad_norm=record.grad_norm,
        )

    def on_end(self, trainer: Trainer, interrupted: bool) -> bool:
        os.close(self._descriptor)
        return False

    def _write(self, trainer: Trainer, event: str, **fields: Any) -> None:
        line = {
            "event": event,
            "step": trainer.state.step,
            "rank": self._rank,
            **fields,
            "scalars": trainer.engine.scalar_state(),
            "state": state_digests(trainer.engine),
        }
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())


def state_digests(engine: Any) -> dict[str, str]:
    """Digests of this rank's share of each logical tensor, 16 hex digits, by ``slot:name``; collective as export is."""
    sums: dict[str, int] = {}
    for fragment in engine.export_state():
        key = f"{fragment.slot}:{fragment.name}"
        sums[key] = (sums.get(key, 0) + fragment_digest(fragment)) % MODULUS
    return {key: f"{value:016x}" for key, value in sums.items()}


def generator_digest(device: torch.device) -> str:
    """Hex digest of the state of torch's generators: the host's and the device's."""
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8)
    if device.type == "cuda":
        digest.update(torch.cuda.get_rng_state(device).numpy().tobytes())
    return digest.hexdigest()
