"""The experiment under verification: the user's overrides, and what verification itself has to set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.verify.compare import Tolerance

if TYPE_CHECKING:
    from pretrain.config.schema import Config

# Users may set these otherwise: their overrides come later.
_DEFAULTS = ("tracking.enabled=false", "train.eval_interval=0", "train.sample_interval=0")
_FORCED = ("train.trace=true",)

TOLERANCES = {"fp32": Tolerance(1e-5, 1e-4), "bf16": Tolerance(2e-2, 1e-1)}
"""By ``train.precision``: sums in another order, over a handful of steps."""


@dataclass(frozen=True)
class Experiment:
    """Overrides as of ``pretrain run``, the user's folder of config files, and tolerances (None: by precision)."""

    overrides: tuple[str, ...]
    config_dir: str | None = None
    loss_tolerance: float | None = None
    grad_tolerance: float | None = None

    def with_overrides(self, more: Sequence[str]) -> Experiment:
        return replace(self, overrides=(*self.overrides, *more))

    @property
    def all_overrides(self) -> list[str]:
        """What a run is started with; of two overrides of one key the later holds."""
        latest: dict[str, str] = {}
        for text in (*_DEFAULTS, *self.overrides, *_FORCED):
            key = text.partition("=")[0]
            latest.pop(key, None)
            latest[key] = text
        return list(latest.values())

    def check(self) -> tuple[dict[str, Any], Config]:
        """The tree that a run would freeze, and the configuration. Raises InvalidConfigError with all faults."""
        from pretrain.config.compose import load_run_config
        from pretrain.config.freeze import frozen_for_new_run

        tree, config = load_run_config(self.all_overrides, self.config_dir)
        return frozen_for_new_run(tree), config

    def check_resumed(self, tree: dict[str, Any], then: Sequence[str]) -> Config:
        """The configuration that ``pretrain resume`` with ``then`` would train. Raises InvalidConfigError."""
        from pretrain.config.check import check
        from pretrain.config.freeze import extend

        return check(extend(tree, then)[0] if then else tree)

    def run_arguments(self, run_path: Path) -> list[str | Path]:
        """Arguments of ``pretrain`` that run it in ``run_path``."""
        config_dir: list[str | Path] = ["--config-dir", self.config_dir] if self.config_dir else []
        return ["run", "--run-dir", run_path, *config_dir, *self.all_overrides]

    def tolerance(self, config: Config) -> Tolerance:
        """What the user asked for, else what suits the precision."""
        usual = TOLERANCES[config.train.precision]
        return Tolerance(
            usual.loss if self.loss_tolerance is None else self.loss_tolerance,
            usual.grad_norm if self.grad_tolerance is None else self.grad_tolerance,
        )
