"""How a rank's process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def left_by(source: str, **streams: object) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(source)
    return subprocess.run([sys.executable, "-c", program], text=True, timeout=60, check=False, **streams)  # type: ignore[call-overload,no-any-return]


def test_handlers_run_threads_end_their_work_and_idle_pools_hold_nothing_up() -> None:
    done = left_by(
        """
        import atexit, threading, time
        from concurrent.futures import ThreadPoolExecutor
        from pretrain.training.entry import _leave
        pool = ThreadPoolExecutor(2)
        pool.submit(int).result()  # its threads wait for more, and are no daemons
        atexit.register(print, "handler")
        may_end = threading.Event()
        def work():
            may_end.wait()
            print("worked", flush=True)
        threading.Thread(target=work).start()
        threading.Timer(0.2, may_end.set).start()
        print("buffered", end=" ")
        _leave(85)
        """,
        capture_output=True,
    )
    assert done.returncode == 85, done.stderr
    assert done.stdout.split() == ["buffered", "worked", "handler"]


def test_a_full_disk_does_not_change_the_code() -> None:
    with open("/dev/full", "w") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": ""}
        source = "from pretrain.training.entry import _leave; print('x'); _leave(85)"
        done = left_by(source, stdout=full, env=environment)
    assert done.returncode == 85
