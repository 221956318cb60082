"""Processes that joined one gloo group and run functions on demand, so that tests pay for imports once."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


class WorkerPool:
    """``size`` processes with a default gloo process group; :meth:`run` calls a function on all of them."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self.alive = True
        self._processes, self._pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of ``function(rank, size, *args)`` by rank; raises with every failed rank's traceback."""
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes: dict[int, tuple[Any, str | None]] = {}
        while len(outcomes) < len(self._pipes):
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in outcomes]
            for pipe in wait(pending, timeout=300) or self._give_up("no answer within 300 s"):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    outcomes[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._give_up(f"rank {rank} died")
                if outcomes[rank][1]:
                    # The others may wait for this rank for ever.
                    self._give_up(f"rank {rank}:\n{outcomes[rank][1]}")
        return [outcomes[rank][0] for rank in range(len(self._pipes))]

    def _give_up(self, reason: str) -> list[Connection]:
        self.close()
        raise AssertionError(reason)

    def close(self) -> None:
        self.alive = False
        for process in self._processes:
            process.kill()
            process.join()


def _free_port() -> int:
    """A port that was free just now, outside the range from which the kernel serves outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _die_with_parent() -> None:
    """A killed test run must not leave workers behind that wait for each other and eat the machine (Linux only)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _leave_groups() -> None:
    """An idle worker must not poll on the groups of the engine that it had."""
    if "megatron.core.parallel_state" in sys.modules:
        import torch

        from pretrain.parallel.megatron_groups import leave_model_parallel

        gc.collect()
        # Whoever leaves first closes connections from which others may still have to read.
        torch.distributed.barrier()
        leave_model_parallel()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    import torch

    from pretrain.parallel.process import ProcessEnvironment, join_process_group

    _die_with_parent()
    torch.set_num_threads(1)
    join_process_group(ProcessEnvironment(rank, size, rank, 0, 1, "127.0.0.1", port, 1), torch.device("cpu"))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(rank, size, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
        else:
            _leave_groups()
