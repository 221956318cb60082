"""Checkpoint folders of a run: naming, the ``latest`` pointer, verification and pruning. Torch-free.

A checkpoint is written under a temporary name and renamed when it is complete, so a folder under its final name was
once whole; ``latest`` is a text file replaced atomically. A crash during a save leaves only a temporary folder, which
is never chosen and is swept by the next writer. ``scores.json`` holds validation losses by step: a step is validated
after it is saved, so its checkpoint cannot hold its own.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

from pretrain.checkpoint.manifest import CheckpointError, CorruptCheckpointError, Manifest, hash_file
from pretrain.config.files import atomic_write_text, fsync_directory

_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".tmp_"
LATEST = "latest"
SCORES = "scores.json"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_step(name: str) -> int | None:
    """Step of a checkpoint's final name; None for another name."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


class CheckpointStore:
    """The ``checkpoints`` folder of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def steps(self) -> list[int]:
        """Steps of all checkpoints under a final name, ascending."""
        if not self.root.is_dir():
            return []
        found = (checkpoint_step(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted(step for step in found if step is not None)

    def path(self, step: int) -> Path:
        return self.root / checkpoint_name(step)

    def temporary_path(self, step: int, attempt: int) -> Path:
        return self.root / f"{_TEMPORARY}{checkpoint_name(step)}_attempt_{attempt:04d}"

    def sweep(self) -> list[str]:
        """Remove temporary folders of interrupted saves; returns their names. Call only as the one writer."""
        if not self.root.is_dir():
            return []
        stale = sorted(entry for entry in self.root.iterdir() if entry.name.startswith(_TEMPORARY))
        for entry in stale:
            shutil.rmtree(entry, ignore_errors=True)
        return [entry.name for entry in stale]

    def commit(self, temporary: Path, step: int) -> Path:
        """Give a complete temporary folder its final name and point ``latest`` at it."""
        final = self.path(step)
        fsync_directory(temporary)
        if final.exists():
            # A rolled-back run reached this step again. The older twin steps aside first, so a crash in between
            # leaves one of the two under a name that the next start either uses or sweeps.
            aside = self.root / f"{_TEMPORARY}replaced_{final.name}"
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
            temporary.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(final)
        fsync_directory(self.root)
        atomic_write_text(self.root / LATEST, final.name + "\n")
        return final

    def set_aside(self, after: int, attempt: int) -> list[str]:
        """Move checkpoints of later steps than ``after`` to ``set_aside_<attempt>`` and point ``latest`` at ``after``.

        A run that goes back begins another history: the later checkpoints belong to the one it leaves. They are kept,
        but must be neither chosen nor counted by :meth:`prune`. Returns their names. Call only as the one writer.
        """
        later = [self.path(step) for step in self.steps() if step > after]
        if later:
            folder = self.root / f"set_aside_{attempt:04d}"
            folder.mkdir(exist_ok=True)
            atomic_write_text(self.root / LATEST, checkpoint_name(after) + "\n")
            for path in later:
                target, number = folder / path.name, 1
                while target.exists():  # an attempt may go back more than once
                    number += 1
                    target = folder / f"{path.name}_{number}"
                path.rename(target)
            fsync_directory(self.root)
        scores = self.scores()
        if any(step > after for step in scores):
            self._write_scores({step: score for step, score in scores.items() if step <= after})
        return [path.name for path in later]

    def scores(self) -> dict[int, float]:
        """Validation losses by step.

        Raises:
            CheckpointError: the file that holds them is damaged.
        """
        path = self.root / SCORES
        try:
            return {int(step): float(loss) for step, loss in json.loads(path.read_text()).items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); remove it: then train.keep_best starts anew"
            ) from error

    def record_score(self, step: int, loss: float) -> None:
        """Remember the validation loss of ``step`` for :meth:`prune`. Call only as the one writer."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._write_scores(self.scores() | {step: loss})

    def _write_scores(self, scores: dict[int, float]) -> None:
        atomic_write_text(self.root / SCORES, json.dumps({str(step): scores[step] for step in sorted(scores)}) + "\n")

    def prune(self, newest: int, *, every: int = 0, best: int = 0) -> list[int]:
        """Remove checkpoints that no policy keeps; returns the removed steps. Call only as the one writer.

        Kept are the ``newest`` (0: all), those of steps that ``every`` divides (0: none), the ``best`` with the lowest
        finite validation loss of exactly their step, and always the one that ``latest`` names.
        """
        steps = self.steps()
        if newest <= 0 or not steps:
            return []
        scores = self.scores() if best else {}
        ranked = sorted((scores[step], step) for step in steps if math.isfinite(scores.get(step, math.nan)))
        latest = self.latest()
        kept = {
            *steps[-newest:],
            *(step for step in steps if every and step % every == 0),
            *(step for _, step in ranked[:best]),
            *(step for step in steps if self.path(step) == latest),
        }
        removed = [step for step in steps if step not in kept]
        for step in removed:
            # Renamed first: a half-removed folder must not stand under a final name.
            doomed = self.root / f"{_TEMPORARY}pruned_{checkpoint_name(step)}"
            self.path(step).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        return removed

    def latest(self) -> Path | None:
        """Newest checkpoint by the pointer, or by name when the pointer is missing or stale; None without any."""
        steps = self.steps()
        if not steps:
            return None
        try:
            named = (self.root / LATEST).read_text().strip()
        except OSError:
            named = ""
        match = _NAME.fullmatch(named)
        if match and (self.root / named).is_dir():
            return self.root / named
        return self.path(steps[-1])

    def select(self, choice: str | None) -> Path | None:
        """Folder for ``choice``: None or ``latest``, a step number, or a folder name.

        Raises:
            CheckpointError: there is no such checkpoint; names those that exist.
        """
        if choice is None or choice == LATEST:
            return self.latest()
        name = checkpoint_name(int(choice)) if choice.isdigit() else choice
        if _NAME.fullmatch(name) and (self.root / name).is_dir():
            return self.root / name
        existing = ", ".join(checkpoint_name(step) for step in self.steps()) or "none"
        raise CheckpointError(f"No checkpoint {choice!r} in {self.root}; existing: {existing}")


def verify(folder: Path, files: list[str] | None = None) -> Manifest:
    """Check sizes and hashes of a checkpoint's files (all, or those named) against its manifest.

    Raises:
        CorruptCheckpointError: naming the folder, every damaged file, what was found and what was expected.
    """
    manifest = Manifest.load(folder)
    faults = []
    named = checkpoint_step(folder.resolve().name)
    if named not in (None, manifest.step):
        faults.append(f"manifest.json is of step {manifest.step}, in a folder of step {named}")
    for name in files if files is not None else sorted(manifest.files):
        expected, path = manifest.files[name], folder / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif path.stat().st_size != expected["bytes"]:
            faults.append(f"{name}: {path.stat().st_size} bytes, expected {expected['bytes']}")
        elif (found := hash_file(path)) != expected["xxh3"]:
            faults.append(f"{name}: hash {found}, expected {expected['xxh3']}")
    if faults:
        raise CorruptCheckpointError(f"Checkpoint {folder} is damaged: " + "; ".join(faults))
    return manifest


def intact_before(store: CheckpointStore, step: int) -> Path | None:
    """Newest checkpoint before ``step`` that passes :func:`verify`; None when there is none."""
    for candidate in reversed([s for s in store.steps() if s < step]):
        try:
            verify(store.path(candidate))
        except CorruptCheckpointError:
            continue
        return store.path(candidate)
    return None
