"""The run's records as lines in rank 0's log. Torch-free."""

from __future__ import annotations

import logging
from typing import Any

from launchers.progress import ProgressState
from pretrain.tracking.metrics_log import MetricsLog

logger = logging.getLogger("pretrain")


class EchoedLog:
    """Metrics records, each also as a plain line in rank 0's log: under any launcher the log tells the run."""

    def __init__(self, metrics: MetricsLog, title: str, attempt: int) -> None:
        self._metrics = metrics
        self._state = ProgressState(title, attempt)

    def write(self, event: str, **fields: Any) -> None:
        line = self._state.update(self._metrics.write(event, **fields))
        if line:
            logger.info("%s", line)
