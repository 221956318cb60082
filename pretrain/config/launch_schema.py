"""Schema of how a run is started and brought back: launchers, the site's cluster, the run's lifecycle. Torch-free.

All fields are extendable: on what machine a run continues, and how it is looked after, changes no result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

EXTENDABLE: dict[str, bool] = {"extendable": True}

Action = Literal["stop", "restart", "requeue", "exclude"]
"""What follows the end of an attempt. ``restart`` starts the next attempt at once on the same nodes, ``requeue`` gives
the allocation back and queues again, ``exclude`` does so without the node at fault; without Slurm the three are one."""


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """All ranks on this machine, one process each.

    ``threads_per_process`` is ``OMP_NUM_THREADS`` (None: share cores). Ranks that were asked to stop are killed after
    ``shutdown_grace_s``. ``max_restarts`` bounds the attempts that follow a fault by themselves; starting the run by
    hand begins the count anew, and with 0 none ever follows. Time limits and preemptions that left new steps are no
    faults.
    """

    name: Literal["local"] = field(default="local", metadata=EXTENDABLE)
    num_processes: int = field(default=1, metadata=EXTENDABLE)
    threads_per_process: int | None = field(default=None, metadata=EXTENDABLE)
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=EXTENDABLE)
    shutdown_grace_s: float = field(default=120.0, metadata=EXTENDABLE)
    max_restarts: int = field(default=0, metadata=EXTENDABLE)


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """A Slurm job: ``num_processes`` ranks, spread evenly over ``num_nodes`` nodes.

    With ``min_nodes`` below ``num_nodes`` the run goes on with fewer nodes when no more are there, down to so many,
    with the same global batch and data order. ``time_limit`` is the job's, in a form that Slurm knows
    (``D-HH:MM:SS``, ``HH:MM:SS``, minutes); a run that needs longer is queued again by itself. ``start`` is one srun
    task per rank, or one ``torchrun`` agent per node. ``template`` is the Jinja2 file of the batch script (None: the
    one shipped in ``slurm/``). ``requeue_by`` tells how a job comes back: ``requeue`` keeps its id, ``submit`` sends
    in a new one, for sites that forbid requeueing. ``node_check`` runs a small all-reduce on every node before the
    first step of an attempt. Other fields: see :class:`LocalConfig`.
    """

    name: Literal["slurm"] = field(default="slurm", metadata=EXTENDABLE)
    num_processes: int = field(default=1, metadata=EXTENDABLE)
    num_nodes: int = field(default=1, metadata=EXTENDABLE)
    min_nodes: int | None = field(default=None, metadata=EXTENDABLE)
    time_limit: str = field(default="01:00:00", metadata=EXTENDABLE)
    start: Literal["srun", "torchrun"] = field(default="srun", metadata=EXTENDABLE)
    template: str | None = field(default=None, metadata=EXTENDABLE)
    requeue_by: Literal["requeue", "submit"] = field(default="requeue", metadata=EXTENDABLE)
    node_check: bool = field(default=True, metadata=EXTENDABLE)
    threads_per_process: int | None = field(default=None, metadata=EXTENDABLE)
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=EXTENDABLE)
    shutdown_grace_s: float = field(default=120.0, metadata=EXTENDABLE)
    max_restarts: int = field(default=20, metadata=EXTENDABLE)

    @property
    def processes_per_node(self) -> int:
        """Ranks on each node (a checked configuration: the division is exact)."""
        return self.num_processes // self.num_nodes


LauncherConfig = LocalConfig | SlurmConfig
"""One of the launchers, told apart by ``name``."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What a site asks of its jobs; a file in ``configs/cluster/`` per site. Strings are passed on as they are.

    ``gres`` may name ``{processes_per_node}``; ``memory_per_node`` is in Slurm's form (``64G``; ``0``: all).
    ``exclude`` lists nodes never to be used. ``sbatch_options`` and ``srun_options`` are further options
    (``--mail-type=FAIL``). ``modules`` are loaded, then ``setup`` lines run, before anything else on the batch host.
    ``environment`` is set for all ranks. ``container`` is the command put before each rank's interpreter
    (``apptainer exec --nv image.sif``), ``python`` the interpreter on the nodes (None: the one that submits), and
    ``container_python`` the ranks' own, where a container of theirs has it elsewhere (None: the same).
    ``network_interface`` goes to NCCL and gloo and gives rank 0's address.
    """

    name: str = field(default="default", metadata=EXTENDABLE)
    account: str | None = field(default=None, metadata=EXTENDABLE)
    partition: str | None = field(default=None, metadata=EXTENDABLE)
    qos: str | None = field(default=None, metadata=EXTENDABLE)
    constraint: str | None = field(default=None, metadata=EXTENDABLE)
    reservation: str | None = field(default=None, metadata=EXTENDABLE)
    gres: str | None = field(default=None, metadata=EXTENDABLE)
    memory_per_node: str | None = field(default=None, metadata=EXTENDABLE)
    exclude: list[str] = field(default_factory=list, metadata=EXTENDABLE)
    sbatch_options: list[str] = field(default_factory=list, metadata=EXTENDABLE)
    srun_options: list[str] = field(default_factory=list, metadata=EXTENDABLE)
    modules: list[str] = field(default_factory=list, metadata=EXTENDABLE)
    setup: list[str] = field(default_factory=list, metadata=EXTENDABLE)
    environment: dict[str, Any] = field(default_factory=dict, metadata=EXTENDABLE)
    container: str | None = field(default=None, metadata=EXTENDABLE)
    python: str | None = field(default=None, metadata=EXTENDABLE)
    container_python: str | None = field(default=None, metadata=EXTENDABLE)
    network_interface: str | None = field(default=None, metadata=EXTENDABLE)

    @property
    def rank_python(self) -> str | None:
        """The interpreter where ranks run, which may be inside a container; None: the one that submits."""
        return self.container_python or self.python


@dataclass(frozen=True, kw_only=True)
class LifecycleConfig:
    """What follows each way in which an attempt may end, and when it counts as hanging. Times in seconds.

    ``on_<class>`` names the action for an exit class (:mod:`launchers.lifecycle.exit_class`). After ``max_repeats``
    ends of one class in a row without a new step the run stops, whatever the action; the launcher's ``max_restarts``
    bounds the restarts after all classes together.

    An attempt hangs when no rank has made progress for ``hang_timeout_s`` (before its first step:
    ``startup_timeout_s``). Ranks tell of themselves every ``heartbeat_interval_s``. A checkpoint before a time limit
    begins ``save_margin`` x the measured time of a save, plus one step, before the end; ``first_save_s`` is taken
    until a save has been measured.
    """

    on_preempted: Action = field(default="requeue", metadata=EXTENDABLE)
    on_time_limit: Action = field(default="requeue", metadata=EXTENDABLE)
    on_node_failure: Action = field(default="exclude", metadata=EXTENDABLE)
    on_device_memory: Action = field(default="stop", metadata=EXTENDABLE)
    on_host_memory: Action = field(default="requeue", metadata=EXTENDABLE)
    on_nonfinite: Action = field(default="stop", metadata=EXTENDABLE)
    on_hang: Action = field(default="restart", metadata=EXTENDABLE)
    on_data_fault: Action = field(default="stop", metadata=EXTENDABLE)
    on_user_error: Action = field(default="stop", metadata=EXTENDABLE)
    on_killed: Action = field(default="restart", metadata=EXTENDABLE)
    on_crash: Action = field(default="restart", metadata=EXTENDABLE)
    max_repeats: int = field(default=3, metadata=EXTENDABLE)
    heartbeat_interval_s: float = field(default=5.0, metadata=EXTENDABLE)
    hang_timeout_s: float = field(default=600.0, metadata=EXTENDABLE)
    startup_timeout_s: float = field(default=1800.0, metadata=EXTENDABLE)
    save_margin: float = field(default=2.0, metadata=EXTENDABLE)
    first_save_s: float = field(default=60.0, metadata=EXTENDABLE)


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What to do at a step whose numbers are bad; all ranks decide alike.

    ``on_nonfinite``: loss or gradient norm is not finite. ``on_spike``: the loss stands ``spike_zscore`` robust
    standard deviations (1.4826 x median absolute deviation, at least 0.1 % of the median) above the median of the last
    ``spike_window`` good steps; not before so many steps are known. ``skip`` leaves the batch out without an update;
    ``rollback`` goes back to the last checkpoint before the step and trains on without the ``skip_window`` batches that
    end with the bad one; ``stop`` ends the attempt. After ``max_events`` bad steps of the run the next one stops it.
    """

    on_nonfinite: Literal["stop", "skip", "rollback"] = field(default="stop", metadata=EXTENDABLE)
    on_spike: Literal["ignore", "skip", "rollback", "stop"] = field(default="ignore", metadata=EXTENDABLE)
    spike_zscore: float = field(default=8.0, metadata=EXTENDABLE)
    spike_window: int = field(default=64, metadata=EXTENDABLE)
    skip_window: int = field(default=1, metadata=EXTENDABLE)
    max_events: int = field(default=10, metadata=EXTENDABLE)
