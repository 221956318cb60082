"""A real MLflow server over HTTP, ready to answer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pretrain.tracking.ui import server_command


@contextlib.contextmanager
def server(store: Path, port: int) -> Iterator[str]:
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(store / "server.log", "ab") as log:
        process = subprocess.Popen(
            server_command(store, "127.0.0.1", port), env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        uri = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    break
            assert process.poll() is None, (store / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server did not answer within two minutes"
            time.sleep(0.2)
        yield uri
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
