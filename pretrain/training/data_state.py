"""The data's part of a run: what order it follows, what was damaged, and how much of that is borne."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.loader import check_loader_state, loader_state
from data_pipeline.quarantine import read_quarantine
from launchers.exit_codes import ExitCode
from pretrain.training.callback import Callback
from pretrain.training.callbacks import EventLog
from pretrain.training.loop import CommonFailureError, Trainer
from pretrain.training.state import StepRecord


class DamageBudgetError(CommonFailureError, ValueError):
    """More rows were substituted than the run may bear."""

    exit_code = ExitCode.DATA_FAULT


class DataCallback(Callback):
    """Keeps the order's state in checkpoints, counts substituted rows, reports the quarantine and holds the budget.

    Register it before callbacks that log or save. ``quarantine`` is the folder into which ranks write what they found
    damaged; ``budget`` None sets no limit.
    """

    name = "data"

    def __init__(self, log: EventLog, source: Any, quarantine: Path, budget: int | None) -> None:
        self._log = log
        self._source = source
        self._quarantine = quarantine
        self._budget = budget
        self._samples = 0
        self._substituted = 0
        self._reported = 0

    def on_start(self, trainer: Trainer) -> None:
        self._samples = trainer.state.samples
        fill = getattr(self._source, "fill", None)
        self._log.write(
            "data",
            fingerprint=self._source.fingerprint,
            num_lanes=getattr(self._source, "num_lanes", None),
            fill=None if fill is None else round(fill, 6),
        )
        self._report_quarantine(trainer.state.step)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._samples = trainer.state.samples
        if not record.substituted and not self._substituted:
            return
        self._substituted += record.substituted
        record.metrics["substituted_rows"] = float(self._substituted)
        if record.substituted:
            record.metrics["quarantined_members"] = float(self._report_quarantine(record.step))
        if self._budget is not None and self._substituted > self._budget:
            raise DamageBudgetError(
                f"Step {record.step}: {self._substituted} rows stood in for damaged data, data.damage_budget is "
                f"{self._budget}. What to do: restore the shards that {self._quarantine} names (pretrain data verify "
                "tells what is wrong with them), or raise the budget: pretrain resume RUN data.damage_budget=..."
            )

    def on_rollback(self, trainer: Trainer) -> None:
        self._samples = trainer.state.samples

    def on_end(self, trainer: Trainer, interrupted: bool) -> bool:
        counters = self._source.counters() if hasattr(self._source, "counters") else {}
        if counters:
            self._log.write("fetched", step=trainer.state.step, counters=counters)
        return False

    def state_dict(self) -> dict[str, Any]:
        return {**loader_state(self._source, self._samples), "substituted": self._substituted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            check_loader_state(self._source, state)
            self._substituted = int(state["substituted"])

    def _report_quarantine(self, step: int) -> int:
        entries = read_quarantine(self._quarantine)
        for entry in entries[self._reported :]:
            self._log.write("quarantine", step=step, **entry)
        self._reported = len(entries)
        return len(entries)
