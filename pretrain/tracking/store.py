"""Where a run is tracked: choosing the MLflow store, and importing MLflow so that it stays quiet and brief.

Torch-free; MLflow itself is imported by :func:`import_client` alone.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.files import NO_ROOM
from pretrain.config.schema import TrackingConfig
from pretrain.tracking.lock import sender_lock
from pretrain.tracking.run_files import redact_url

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# By MLflow's own defaults one call to a dead server blocks for minutes, and a request that was answered too late is
# repeated blindly. We try once, and again at a later flush, after a look at what has arrived.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
# Answers that stay the same until someone changes something.
_LASTING = (
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "CUSTOMER_UNAUTHORIZED",
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "RESOURCE_DOES_NOT_EXIST",
    "NOT_IMPLEMENTED",
)
_LASTING_ERRNO = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, *NO_ROOM)
_ours: dict[str, str] = {}
_opening = threading.Lock()


def resolve_uri(tracking: TrackingConfig) -> str:
    """``tracking.uri``, else ``$MLFLOW_TRACKING_URI``, else the SQLite file in ``tracking.store``."""
    return tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri(Path(tracking.store).absolute())


def embedded_uri(store: Path) -> str:
    """URI of the embedded store in folder ``store``."""
    return f"sqlite:///{store}/mlflow.db"


def embedded_folder(uri: str) -> Path | None:
    """The folder of an embedded SQLite store; None for a server or another kind of store."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).parent


def import_client(uri: str, request_timeout_s: float = 60.0) -> MlflowClient:
    """Imports MLflow (seconds) and opens ``uri``; makes the folder and tables of an embedded store.

    An unanswered request is given up after ``request_timeout_s``; what the user's environment says about MLflow comes
    first. Raises what MLflow and the file system raise.
    """
    with _opening:
        for name, value in {**_SETTINGS, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(request_timeout_s))}.items():
            if os.environ.get(name) in (None, _ours.get(name)):
                os.environ[name] = _ours[name] = value
        from mlflow.tracking import MlflowClient

        # Table creation and every retry are announced line by line otherwise.
        for name in ("mlflow", "mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
        folder = embedded_folder(uri)
        if folder is None:
            return MlflowClient(tracking_uri=uri)
        folder.mkdir(parents=True, exist_ok=True)
        # Two runs that start at the same moment must not both make the tables.
        with sender_lock(folder / ".opening.lock", timeout_s=120.0):
            return MlflowClient(tracking_uri=uri)


def run_link(uri: str, run_id: str | None, experiment_id: str | None) -> str:
    """Where a person sees the run: its page on a server, or how to open the embedded store."""
    uri = redact_url(uri)
    folder = embedded_folder(uri)
    if folder is not None:
        return f"pretrain ui --store {folder}"
    if not uri.startswith(("http://", "https://")) or run_id is None:
        return uri
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def passes_by_itself(error: BaseException) -> bool:
    """Whether trying again later can help: a server that is away or busy, rather than a refusal."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _LASTING_ERRNO
    return not isinstance(error, ImportError) and error_code(error) not in _LASTING


def error_code(error: BaseException) -> str:
    """MLflow's name for an error, such as ``RESOURCE_DOES_NOT_EXIST``; empty for other exceptions."""
    code: Any = getattr(error, "error_code", "")
    return str(code)
