"""Live tracking: one background thread of rank 0 keeps MLflow up to date with the run directory.

The training loop never talks to MLflow. It appends to ``metrics.jsonl``; the thread sends what is new at
intervals. When the store cannot be reached nothing is lost and nothing waits: a later flush, the next
attempt or ``pretrain tracking sync`` sends it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.config.schema import TrackingConfig
from pretrain.tracking.lifecycle import Status
from pretrain.tracking.lock import BusyError
from pretrain.tracking.run_files import redact_url
from pretrain.tracking.store import resolve_uri, run_link
from pretrain.tracking.uploader import ArtifactsError, RunUploader

logger = logging.getLogger(__name__)

# Between tries at a store that does not answer; a flush costs little, but its complaints are of no use.
_LONGEST_WAIT_S = 60.0
# After an outage much is to be sent. Encoding it takes the interpreter away from training: for this share of time.
_BUSY_SHARE = 0.02
# Rank 0 that was asked to stop is waited for: by a scheduler, or by ranks of the next attempt, which sends the rest.
_SHORT_CLOSE_S = 5.0
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class MlflowTracker:
    """Sends ``run_path`` to MLflow from a thread of its own until :meth:`close`. Never raises, never blocks.

    Args:
        tags: facts of this run for MLflow beside those of ``environment.json`` and ``git.json``.
        artifacts: files outside the run directory to keep with the run, such as the tokeniser. The run's own records
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
        self._config = tracking
        self._uri = resolve_uri(tracking)
        self._run_name = run_name
        self._tags = {**(tags or {}), "attempt": str(attempt)}
        self._artifacts = list(artifacts)
        self._closing = threading.Event()
        self._deadline = 0.0
        self._final_status: str | None = None
        self._uploader: RunUploader | None = None
        self._complaint = ""
        self._failures = 0
        self._complete = False
        # A daemon: a store that hangs must not keep the rank from ending.
        self._thread = threading.Thread(target=self._run, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def close(self, status: str | None = None, timeout: float | None = None) -> bool:
        """Sends the rest and tells whether all arrived within ``timeout`` seconds.

        None means ``close_timeout_s``, for a run that goes on or failed 5 s at most. ``status`` (finished, interrupted,
        failed) counts only when metrics.jsonl could not take an ``end`` record.
        """
        if timeout is None:
            timeout = self._config.close_timeout_s
            timeout = timeout if status == "finished" else min(_SHORT_CLOSE_S, timeout)
        self._final_status = status
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        if not self._complete:
            logger.warning(
                "MLflow at %s did not take everything in %.0f s; nothing is lost: a next attempt sends the rest, or "
                "send it with: pretrain tracking sync %s",
                redact_url(self._uri),
                timeout,
                self._run_path,
            )
        return self._complete

    def _run(self) -> None:
        while True:
            closing = self._closing.is_set()
            try:
                self._send()
                self._complete = closing
                wait = self._config.flush_interval_s
                self._recovered()
            except BusyError:
                # A user's sync, or the sender of an attempt that is over: it sends what we would.
                wait = min(1.0, self._config.flush_interval_s)
            except Exception as error:
                # Whatever goes wrong here, from a full disk to a server's refusal, is no reason to stop training.
                self._complain(error)
                wait = min(max(_LONGEST_WAIT_S, self._config.flush_interval_s), self._wait_after_failure())
            if closing:
                # A server that has just come back, or another sender, deserves another look while there is time.
                if self._complete or time.monotonic() + min(1.0, wait) >= self._deadline:
                    return
                time.sleep(min(1.0, wait))
            else:
                self._closing.wait(wait)

    def _send(self) -> None:
        if self._uploader is None:
            uploader = RunUploader(
                self._run_path,
                self._uri,
                self._config.experiment,
                request_timeout_s=self._config.request_timeout_s,
            )
            uploader.remember(self._run_name, self._tags, self._artifacts)
            self._uploader = uploader
        is_done = False
        while not is_done:
            started = time.thread_time()
            is_done = self._uploader.step()[1]
            if not is_done:
                self._closing.wait((time.thread_time() - started) / _BUSY_SHARE)
        if self._closing.is_set() and self._final_status is not None:
            self._uploader.finish_unrecorded(Status(_STATUS.get(self._final_status, "FAILED"), time.time()))

    def _wait_after_failure(self) -> float:
        return float(self._config.flush_interval_s * 2 ** min(self._failures - 1, 16))

    def _recovered(self) -> None:
        if self._failures:
            logger.info("MLflow at %s takes records again; nothing was lost", redact_url(self._uri))
        elif not self._complaint and self._uploader is not None:
            uploader = self._uploader
            logger.info("MLflow: %s", run_link(self._uri, uploader.run_id, uploader.experiment_id))
            self._complaint = "told"
        self._failures = 0

    def _complain(self, error: Exception) -> None:
        self._failures += 1
        # The first line: causes further down differ at every try (addresses of objects).
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        if type(error).__name__ != self._complaint:
            self._complaint = type(error).__name__
            what = (
                "MLflow at %s has the run's values and status, but %s; the files stay in the run directory"
                if isinstance(error, ArtifactsError)
                else "MLflow at %s cannot be written (%s); training goes on, metrics.jsonl keeps all for later"
            )
            logger.warning(what, redact_url(self._uri), redact_url(text)[:300])
