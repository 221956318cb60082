"""Where a run is tracked: choosing the MLflow store, and importing MLflow so that it stays quiet and brief.

Torch-free; MLflow itself is imported by :func:`import_client` alone.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.schema import TrackingConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# By MLflow's own defaults one call to a dead server blocks for minutes; we retry at the next flush instead.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


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


def import_client(uri: str) -> MlflowClient:
    """Imports MLflow (seconds) and opens ``uri``; makes the folder and tables of an embedded store.

    Raises what MLflow and the file system raise.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    folder = embedded_folder(uri)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    from mlflow.tracking import MlflowClient

    # Table creation and every retry are announced line by line otherwise.
    for name in ("mlflow", "mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


def error_code(error: Exception) -> str:
    """MLflow's name for an error, such as ``RESOURCE_DOES_NOT_EXIST``; empty for other exceptions."""
    code: Any = getattr(error, "error_code", "")
    return str(code)
