"""What to tell a user whose checkpoint is damaged. Torch-free."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.store import CheckpointStore, intact_before


def describe_damage(store: CheckpointStore, folder: Path, faults: list[str]) -> str:
    """The damage and the way out: the newest intact checkpoint before ``folder``."""
    previous = intact_before(store, int(folder.name.removeprefix("step_")))
    if previous is None:
        way_out = "No earlier intact checkpoint exists; start a new run."
    else:
        way_out = (
            f"The newest intact checkpoint before it is {previous.name}: continue from it with "
            f"`pretrain resume {store.root.parent} --checkpoint {previous.name}`."
        )
    return ". ".join([*(fault.rstrip(".") for fault in faults), way_out])
