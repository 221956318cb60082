"""Concern: the tracking server answers. Training does not need it, so all of this is a warning at most. Torch-free."""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from pretrain.planning.preflight.findings import Finding, ok, warning
from pretrain.planning.preflight.storage import file_system, nearest_folder
from pretrain.planning.preflight.subject import Subject
from pretrain.tracking.run_files import redact_url
from pretrain.tracking.store import embedded_folder, resolve_uri

TIMEOUT_S = 3.0
_NEEDLESS = "metrics.jsonl is written without it, and `pretrain tracking sync RUN` sends it later"
_STORE = f"another tracking.store; {_NEEDLESS}"
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def check(subject: Subject) -> Iterator[Finding]:
    """The configured server or store, seen from here."""
    tracking = subject.config.tracking
    if not tracking.enabled:
        yield ok("tracking", "switched off")
        return
    if importlib.util.find_spec("mlflow") is None:
        yield warning("mlflow", "not installed", "the package", f"pip install mlflow; {_NEEDLESS}")
        return
    uri = resolve_uri(tracking)
    shown = redact_url(uri)
    if uri.startswith(("http://", "https://")):
        yield from _server(subject, uri, shown)
    elif (folder := embedded_folder(uri)) is not None:
        place = nearest_folder(folder)
        if not os.access(place, os.W_OK | os.X_OK):
            yield warning(
                "tracking.store",
                f"{folder} cannot be written",
                "a folder that can",
                _STORE,
            )
        elif subject.slurm is not None and file_system(place) in ("tmpfs", "ramfs"):
            yield warning(
                "tracking.store",
                f"{folder} is memory of this host",
                "a folder that the nodes see",
                _STORE,
            )
        else:
            yield ok("tracking", f"{shown}: {folder} can be written")
    else:
        yield ok("tracking", f"{shown}: not a server with an address to ask")


def _server(subject: Subject, uri: str, shown: str) -> Iterator[Finding]:
    trouble = _trouble(uri)
    if trouble is None:
        yield ok("tracking", f"{shown} answers")
    else:
        fix = f"start the server, or correct tracking.uri (or $MLFLOW_TRACKING_URI); {_NEEDLESS}"
        yield warning("tracking", f"{shown}: {trouble}", f"an answer to /health within {TIMEOUT_S:g} s", fix)
    host = urlsplit(uri).hostname or ""
    if subject.slurm is not None and host in _LOCAL_HOSTS:
        yield warning(
            "tracking.uri",
            f"{shown}: on a node {host} is that node itself",
            "an address that all nodes reach",
            f"the name of this host in its place; {_NEEDLESS}",
        )


def _trouble(uri: str) -> str | None:
    parts = urlsplit(uri)
    request = urllib.request.Request(uri.rstrip("/") + "/health")
    if parts.username is not None:
        import base64
        from urllib.parse import unquote

        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        host = parts.netloc.rpartition("@")[2]
        request = urllib.request.Request(f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health")
        request.add_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as fault:
        return f"answers {fault.code} to /health"
    except (OSError, ValueError) as fault:
        return f"does not answer: {getattr(fault, 'reason', fault)}"
