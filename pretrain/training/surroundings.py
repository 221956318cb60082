"""What must agree between a rank and the others before it joins them. Torch-free."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.config.schema import Config
    from pretrain.parallel.process import ProcessEnvironment

# Packages whose numbers or state would differ between ranks of mixed versions.
_SHARED_PACKAGES = frozenset({"pretrain", "torch", "numpy", "deepspeed", "megatron-core", "safetensors"})


def check_surroundings(run: RunDir, config: Config, env: ProcessEnvironment) -> None:
    """What must agree between this rank and the others, checked before it joins them.

    Raises:
        ValueError: naming the number of processes, or every package, that differs.
    """
    from launchers.provenance import package_versions

    faults = []
    if env.world_size != config.launcher.num_processes:
        faults.append(
            f"{env.world_size} processes were started, expected launcher.num_processes="
            f"{config.launcher.num_processes}; start that many, or `pretrain resume {run.path} "
            f"launcher.num_processes={env.world_size}`"
        )
    recorded, here = run.recorded_versions(env.attempt), package_versions()
    for name in sorted(_SHARED_PACKAGES & (recorded.keys() | here.keys())) if recorded else ():
        if recorded.get(name) != here.get(name):
            faults.append(
                f"{name} {here.get(name, 'is missing')} on {socket.gethostname()}, {recorded.get(name, 'none')} where "
                "the run was started; use the same environment on all nodes"
            )
    if faults:
        raise ValueError("This rank does not fit the run: " + "; ".join(faults))
