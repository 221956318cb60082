"""A rank that steps through collectives with a heartbeat and then hangs in a chosen way: a program for tests.

python hanging_rank.py RUN_DIR PORT RANK SIZE BEHAVIOUR: at step 3 rank 1 does what BEHAVIOUR says, the others go on.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path


def main() -> None:
    run_dir, port, rank, size, behaviour = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    from launchers.run_dir import RunDir
    from pretrain.parallel.pulse import PULSE
    from pretrain.training.heartbeat import Heart, Place
    from pretrain.training.signals import StopRequest

    stop = StopRequest()
    stop.install()
    heart = Heart(RunDir(Path(run_dir)), Place(rank, 1, f"node{rank + 1}"), stop)
    heart.interval_s = 0.3
    heart.start()
    import torch
    import torch.distributed as dist

    from pretrain.parallel.process import ProcessEnvironment, join_process_group

    join_process_group(ProcessEnvironment(rank, size, rank, 0, 1, "127.0.0.1", port, 1), torch.device("cpu"))
    others = dist.new_group(list(range(size)))
    for step in range(1, 4):
        PULSE.enter("data")
        if step == 3 and rank == 1:
            misbehave(behaviour, others)
        PULSE.enter("all-reduce")
        if step == 3 and behaviour == "no sender":
            dist.recv(torch.ones(1), 1)
        dist.all_reduce(torch.ones(step))
        PULSE.completed(step)
    heart.close()


def misbehave(behaviour: str, others: object) -> None:
    import torch
    import torch.distributed as dist

    from pretrain.parallel.pulse import PULSE

    if behaviour == "loop":
        PULSE.enter("forward")
        while True:
            pass
    if behaviour in ("wait", "no sender"):
        threading.Event().wait()
    if behaviour == "hold interpreter":
        ctypes.PyDLL(None).sleep(1000)
    if behaviour == "other collective":
        PULSE.enter("optimizer")
        dist.all_reduce(torch.ones(7), group=others)


if __name__ == "__main__":
    main()
