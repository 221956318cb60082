"""``launcher.start: torchrun``: one agent of torch elastic per node instead of one srun task per rank.

This file is a program with two roles, both run by path so that they need nothing but an interpreter. ``node`` becomes
the agent of a node; ``rank`` turns what the agent says of a rank's place into the process contract and becomes the
rank. The agent must outlive the signals that ask ranks to save: it would leave, and kill the ranks amid their save.
Slurm signals every process of a step, so ranks get them without the agent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_LEFT_TO_RANKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_CONTRACT = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "GROUP_RANK": "SLURM_NODEID",
    "GROUP_WORLD_SIZE": "SLURM_NNODES",
}
_PR_SET_PDEATHSIG = 1


def node_command(program: Sequence[str], *, num_nodes: int, per_node: int, logs: Path) -> list[str]:
    """Command of a node's srun task, which starts ``per_node`` ranks; ``program`` begins with an interpreter."""
    return [program[0], __file__, "node", str(num_nodes), str(per_node), str(logs), *program]


def agent_command(num_nodes: int, per_node: int, logs: str, program: Sequence[str]) -> list[str]:
    """The agent's own command, from the environment of its srun task."""
    env = os.environ
    return [
        program[0],
        "-m",
        "torch.distributed.run",
        f"--nnodes={num_nodes}",
        f"--nproc-per-node={per_node}",
        f"--node-rank={env['SLURM_NODEID']}",
        "--rdzv-backend=static",
        f"--rdzv-endpoint={env['MASTER_ADDR']}:{env['MASTER_PORT']}",
        f"--rdzv-id={env.get('SLURM_JOB_ID', '0')}_{env['PRETRAIN_ATTEMPT']}",
        "--max-restarts=0",
        # A signal that nobody sends: with none at all the agent would take its default ones.
        "--signals-to-handle=SIGURG",
        "--no-python",
        program[0],
        __file__,
        "rank",
        logs,
        *program,
    ]


def _become_node(arguments: list[str]) -> None:
    num_nodes, per_node, logs, *program = arguments
    for number in _LEFT_TO_RANKS:
        signal.signal(number, signal.SIG_IGN)
    command = agent_command(int(num_nodes), int(per_node), logs, program)
    os.execvp(command[0], command)


def _become_rank(arguments: list[str]) -> None:
    logs, *program = arguments
    for theirs, ours in _CONTRACT.items():
        os.environ[ours] = os.environ[theirs]
    os.environ["SLURM_NTASKS_PER_NODE"] = os.environ["LOCAL_WORLD_SIZE"]
    log = os.open(
        os.path.join(logs, f"rank_{int(os.environ['RANK']):05d}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    for stream in (1, 2):
        os.dup2(log, stream)
    for number in _LEFT_TO_RANKS:
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.execvp(program[0], program)


if __name__ == "__main__":
    {"node": _become_node, "rank": _become_rank}[sys.argv[1]](sys.argv[2:])
