"""Live tracking: one background thread of rank 0 keeps MLflow up to date with the run directory.

The training loop never talks to MLflow. It appends to ``metrics.jsonl``; the thread sends what is new at
intervals. When the store cannot be reached nothing is lost and nothing waits: the next flush, the next
attempt or ``pretrain sync`` sends it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.config.schema import TrackingConfig
from pretrain.tracking.run_files import redact_url
from pretrain.tracking.store import resolve_uri
from pretrain.tracking.uploader import STATUS, RunUploader

logger = logging.getLogger(__name__)


class MlflowTracker:
    """Sends ``run_path`` to MLflow from a thread of its own until :meth:`close`. Never raises, never blocks.

    Args:
        tags: facts of this run for MLflow beside those of ``environment.json`` and ``git.json``.
        artifacts: files outside the run directory to keep with the run, such as the tokeniser. The run's
        own records
            and everything in its ``artifacts`` folder are sent as well, when the run ends.
    """

    def __init__(
        self,
        run_path: Path,
        tracking: TrackingConfig,
        *,
        attempt: int,
        run_name: str,
        tags: Mapping[str, str] | None = None,
        artifacts: Sequence[str] = (),
    ) -> None:
        self._run_path = run_path
        self._uri = resolve_uri(tracking)
        self._experiment = tracking.experiment
        self._interval_s = tracking.flush_interval_s
        self._run_name = run_name
        self._tags = {**(tags or {}), "attempt": str(attempt)}
        self._artifacts = list(artifacts)
        self._closing = threading.Event()
        self._final_status: str | None = None
        self._complaint = ""
        self._complete = False
        # A daemon: a store that hangs must not keep the rank from ending.
        self._thread = threading.Thread(target=self._run, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def close(self, status: str | None = None, timeout: float = 60.0) -> bool:
        """Sends the rest and ends the run in MLflow; tells whether all arrived within ``timeout`` seconds.

        ``status`` (finished, interrupted, failed) counts only when metrics.jsonl could not take an ``end``
        record.
        """
        self._final_status = status
        self._closing.set()
        self._thread.join(timeout)
        if not self._complete:
            logger.warning(
                "MLflow at %s did not take everything; send the rest with: pretrain sync %s",
                redact_url(self._uri),
                self._run_path,
            )
        return self._complete

    def _run(self) -> None:
        uploader: RunUploader | None = None
        while True:
            last_time = self._closing.is_set()
            try:
                if uploader is None:
                    uploader = RunUploader(self._run_path, self._uri, self._experiment)
                    uploader.remember(self._run_name, self._tags, self._artifacts)
                uploader.flush()
                if last_time and self._final_status is not None and not uploader.ended:
                    uploader.finish(STATUS.get(self._final_status, "FAILED"), time.time())
                self._complete = last_time
                self._complaint = ""
            except Exception as error:
                # Whatever goes wrong here, from a full disk to a server's refusal, is no reason to stop
                # training.
                self._complain(error)
                if uploader is not None:
                    uploader.rewind()
            if last_time:
                return
            self._closing.wait(self._interval_s)

    def _complain(self, error: Exception) -> None:
        # The first line: causes further down differ at every try (addresses of objects).
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        if type(error).__name__ != self._complaint:
            self._complaint = type(error).__name__
            logger.warning(
                "MLflow at %s cannot be written (%s); training goes on, metrics.jsonl keeps all for later",
                redact_url(self._uri),
                redact_url(text)[:300],
            )
