"""``pretrain ui``: the MLflow user interface on the embedded store, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--store", type=Path, default=Path("mlruns"), help="folder of the store (tracking.store)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=5000)


def server_command(store: Path, host: str, port: int) -> list[str]:
    """The MLflow server on ``store``: one worker, artifacts served from the store's folder."""
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", f"sqlite:///{store}/mlflow.db"),
        *("--default-artifact-root", (store / "artifacts").as_uri()),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]


def run(args: argparse.Namespace) -> int:
    """The verb; returns an exit code. Ctrl-C or SIGTERM ends the server and all its workers."""
    remote = os.environ.get("MLFLOW_TRACKING_URI", "")
    if remote.startswith(("http://", "https://")):
        print(f"runs are tracked on a server ($MLFLOW_TRACKING_URI): open {remote}")
        return 0
    store = args.store.absolute()
    if not (store / "mlflow.db").is_file():
        print(
            f"pretrain ui: {store}: no MLflow store there (expected mlflow.db). "
            f"A first `pretrain run` makes one; name another with --store.",
            file=sys.stderr,
        )
        return 2
    # Job execution would start eight more processes that tracking has no use for.
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    print(
        f"MLflow on {store}: http://{args.host}:{args.port} (ready in a few seconds; Ctrl-C ends it)",
        flush=True,
    )
    return run_until_signal(server_command(store, args.host, args.port), {**os.environ, **settings})


def run_until_signal(command: list[str], environment: dict[str, str], grace_s: float = 10.0) -> int:
    """Runs ``command`` in a process group of its own; on Ctrl-C or SIGTERM ends the group and returns 0.

    Returns the command's exit code when it ends by itself.
    """
    stopped: list[int] = []
    server: subprocess.Popen[bytes] | None = None

    def stop(number: int, _frame: object) -> None:
        stopped.append(number)
        if server is not None:
            _signal_group(server, signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        if stopped:
            _signal_group(server, signal.SIGTERM)
        code: int | None = None
        while code is None:
            try:
                code = server.wait(grace_s if stopped else 1.0)
            except subprocess.TimeoutExpired:
                if stopped:
                    _signal_group(server, signal.SIGKILL)
        return 0 if stopped else code
    finally:
        if server is not None:
            # Workers outlive a server that was killed, and keep its port.
            _signal_group(server, signal.SIGKILL)
            server.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return
