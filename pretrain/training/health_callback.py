"""Recording bad steps: an event in ``metrics.jsonl``, a file with the samples of the batch and where they come from."""

from __future__ import annotations

import logging
from typing import Any

from data_pipeline.source import DataSources
from pretrain.parallel.process import gather_objects
from pretrain.training.batches import SAMPLE_IDS
from pretrain.training.callback import Callback
from pretrain.training.callbacks import EventLog
from pretrain.training.health import BadStep, HealthMonitor
from pretrain.training.health_records import HealthRecords
from pretrain.training.loop import Trainer

logger = logging.getLogger("pretrain")

_EXCERPT_CHARACTERS = 400


class HealthCallback(Callback):
    """Keeps the judge's state in checkpoints and writes down bad steps. Register it on all ranks."""

    name = "health"

    def __init__(
        self, log: EventLog, monitor: HealthMonitor, records: HealthRecords, sources: DataSources, *, rank: int
    ) -> None:
        self._log = log
        self._monitor = monitor
        self._records = records
        self._sources = sources
        self._rank = rank

    def on_bad_step(self, trainer: Trainer, bad: BadStep) -> None:
        own = self._samples(trainer) if trainer.engine.is_data_leader else []
        samples = [sample for part in gather_objects(own) for sample in part]
        if self._rank != 0:
            return
        samples.sort(key=lambda sample: int(sample["id"]))
        facts = bad.facts()
        path = None
        try:
            path = self._records.add(bad.step, {**facts, "skipped_before": bad.skipped_before, "samples": samples})
        except (OSError, ValueError) as error:
            # The run can go on: the next checkpoint holds what is left out.
            logger.error("could not record bad step %d: %s", bad.step, error)
        self._log.write("health", step=bad.step, **facts, file=None if path is None else str(path))

    def state_dict(self) -> dict[str, Any]:
        return self._monitor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._monitor.load_state_dict(state)

    def _samples(self, trainer: Trainer) -> list[dict[str, Any]]:
        """This rank's samples of the step: id, provenance, and the beginning of the text where there is one."""
        decode = text_decoder(self._sources.tokenizer_path)
        samples = []
        for batch in trainer.host_batches:
            for row, sample_id in enumerate(int(i) for i in batch[SAMPLE_IDS]):
                sample: dict[str, Any] = {"id": sample_id, "provenance": provenance(self._sources.train, sample_id)}
                if decode is not None and "tokens" in batch:
                    sample["text"] = decode(batch["tokens"][row].tolist())[:_EXCERPT_CHARACTERS]
                samples.append(sample)
        return samples


def provenance(source: Any, sample_id: int) -> Any:
    """Where a sample comes from, or why that cannot be told."""
    try:
        return source.provenance(sample_id)
    except Exception as error:  # a description must not end a run
        return f"unknown: {type(error).__name__}: {error}"


def text_decoder(tokenizer_path: str | None) -> Any:
    """Token ids to text, or None without a usable tokenizer."""
    if not tokenizer_path:
        return None
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    except Exception as error:
        logger.warning("no text is shown: %s cannot be read: %s", tokenizer_path, error)
        return None
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
