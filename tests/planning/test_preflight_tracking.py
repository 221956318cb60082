"""The tracking server before a run: asked briefly, and never a reason not to start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pretrain.config.launch_schema import SlurmConfig
from pretrain.config.schema import TrackingConfig
from pretrain.planning.preflight import tracking
from pretrain.planning.preflight.findings import Level
from pretrain.planning.preflight.subject import Subject


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Health) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_server_that_answers(subject: Callable[..., Subject], server: str) -> None:
    (found,) = tracking.check(subject(tracking=TrackingConfig(uri=f"http://{server}")))
    assert found.level is Level.OK


def test_a_password_is_sent_and_not_shown(subject: Callable[..., Subject], server: str) -> None:
    (found,) = tracking.check(subject(tracking=TrackingConfig(uri=f"http://me:secret@{server}")))
    assert found.level is Level.OK
    assert "secret" not in found.found


def test_another_server_and_none(subject: Callable[..., Subject], server: str) -> None:
    for uri in (f"http://{server}/elsewhere", "http://127.0.0.1:9", "http://no.such.host.invalid"):
        (found,) = tracking.check(subject(tracking=TrackingConfig(uri=uri)))
        assert found.level is Level.WARNING


def test_this_host_is_another_one_on_a_node(subject: Callable[..., Subject], server: str) -> None:
    settings = TrackingConfig(uri=f"http://{server}")
    found = list(tracking.check(subject(tracking=settings, launcher=SlurmConfig())))
    assert [finding.level for finding in found] == [Level.OK, Level.WARNING]


def test_a_silent_server_is_given_up(subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(tracking, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # it accepts and says nothing
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        (found,) = tracking.check(subject(tracking=TrackingConfig(uri=uri)))
    assert found.level is Level.WARNING
    assert "timed out" in found.found


def test_the_embedded_store(subject: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (found,) = tracking.check(subject(tracking=TrackingConfig(store=str(tmp_path / "mlruns"))))
    assert found.level is Level.OK
    assert not (tmp_path / "mlruns").exists()
