"""What a preflight looks at: a run before it starts, or one that is to go on. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from pretrain.config.launch_schema import SlurmConfig
from pretrain.config.schema import Config
from pretrain.config.violation import Violation

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.planning.preflight.cluster_facts import ClusterFacts


@dataclass(frozen=True)
class Subject:
    """A run.

    ``run`` is its directory, when there is one already; ``path`` is where it will be, when that is not below
    ``run.root``. ``violations`` are faults of the configuration that the check
    found; what lies in nodes of ``unusable`` means nothing.
    """

    tree: Mapping[str, Any]
    config: Config
    run: RunDir | None = None
    path: Path | None = None
    violations: Sequence[Violation] = ()
    unusable: frozenset[str] = field(default_factory=frozenset)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @property
    def place(self) -> Path:
        """The folder that must take what the run writes: its directory, or the one below which it will be made."""
        if self.run is not None:
            return self.run.path
        return (self.path or Path(self.config.run.root)).absolute()

    @property
    def slurm(self) -> SlurmConfig | None:
        """The launcher's settings, when it is Slurm."""
        return self.config.launcher if isinstance(self.config.launcher, SlurmConfig) else None

    @property
    def num_nodes(self) -> int:
        return self.slurm.num_nodes if self.slurm is not None else 1

    @property
    def ranks_per_node(self) -> int:
        """Ranks on the fullest node."""
        return -(-self.config.launcher.num_processes // max(self.num_nodes, 1))

    @property
    def sequence_length(self) -> int | None:
        """Tokens of a training sequence, when the data say so."""
        from pretrain.config.components import component_attribute

        try:
            length = component_attribute(self.config.data, "sequence_length")
        except (OSError, ValueError):
            return None
        return length if isinstance(length, int) else None

    @cached_property
    def parameters(self) -> int | None:
        """Trained parameters of the model by its own account of cost; None for a model that states none."""
        from pretrain.models.hybrid.config import HybridConfig

        if "model" in self.unusable or not isinstance(self.config.model, HybridConfig):
            return None
        from pretrain.models.hybrid.cost import model_cost

        return model_cost(self.config.model, self.sequence_length or 1).parameters

    @property
    def uses_gpu(self) -> bool | None:
        """Whether ranks will compute on GPUs; None when this host cannot know."""
        device = self.config.launcher.device
        if device != "auto":
            return device == "cuda"
        if self.slurm is not None:
            return True if "gpu" in (self.config.cluster.gres or "") else None
        return Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()

    def cluster_facts(self) -> ClusterFacts:
        """What Slurm says, asked by the first that wants to know. Raises SlurmError to all."""
        with self._lock:
            return self._facts

    @cached_property
    def _facts(self) -> ClusterFacts:
        from pretrain.planning.preflight.cluster_facts import ClusterFacts

        return ClusterFacts.read()
