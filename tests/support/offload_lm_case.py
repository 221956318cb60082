"""The tiny language model with offloaded optimizer state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from support.lm_case import Case

from pretrain.config.schema import Config, OffloadConfig


@dataclass(frozen=True)
class OffloadCase(Case):
    """A layout with ``optimizer.offload``; small subgroups, so that there are several of each parameter group."""

    offload: OffloadConfig = field(default_factory=lambda: OffloadConfig(enabled=True, subgroup_size=700))
    device: str = "host"
    """See :class:`support.offload_engine_case.OffloadCase`."""

    def config(self) -> Config:
        config = super().config()
        return replace(config, optimizer=replace(config.optimizer, offload=self.offload))

    def without_offload(self) -> Case:
        """The same layout with the optimizer state where it is by default."""
        return replace(self, offload=OffloadConfig())
