"""What ``pretrain eval`` evaluates: a run's checkpoint or an imported folder; where its results go. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.config.schema import Config

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Subject:
    """A checkpoint with the configuration of its model.

    Attributes:
        run: with ``config``, where the checkpoint is of a run.
        folder: of the results.
    """

    checkpoint: Path
    model: Any
    folder: Path
    run: RunDir | None = None
    config: Config | None = None

    @property
    def seed(self) -> int:
        """Keys draws of tasks that sample."""
        return 0 if self.config is None else self.config.run.seed

    def tokenizer(self) -> Path:
        """The tokenizer of the run's data, or of the imported folder. Raises ValueError if there is none."""
        from pretrain.config.components import build_component
        from pretrain.exchange.imported import TOKENIZER_FILE, imported_tokenizer

        if self.config is None:
            found = imported_tokenizer(self.folder)
            missing = f"{self.folder} has no {TOKENIZER_FILE}"
        else:
            found = build_component(self.config.data, seed=self.seed).tokenizer_path
            missing = "the run's data source has no tokenizer"
        if found is None:
            raise ValueError(f"{missing}, which the harness needs; name one with --tokenizer")
        return Path(found)

    def max_length(self, wanted: int | None) -> int:
        """Tokens that the model reads at most. Raises ValueError if ``wanted`` is more than it can."""
        longest = getattr(self.model, "max_sequence_length", None)
        if longest is not None and wanted is not None and wanted > longest:
            raise ValueError(f"--max-length: found {wanted}, the model reads at most {longest} (max_sequence_length)")
        trained = None if self.config is None else getattr(self.config.data, "sequence_length", None)
        return int(wanted or longest or trained or DEFAULT_LENGTH)


def find_subject(source: Path, choice: str | None) -> Subject:
    """The subject that ``source`` is: a run directory (``choice``: of its checkpoints, None for the latest), the folder
    of one of its checkpoints, an imported folder or its checkpoint.

    Raises:
        ValueError: it is none of these, or names a checkpoint while ``choice`` does, too.
        CheckpointError: the run has no such checkpoint.
    """
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.locate import IMPORTED_CHECKPOINT, checkpoint_folder
    from pretrain.checkpoint.manifest import MANIFEST_NAME, CheckpointError
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.config.check import check
    from pretrain.exchange.imported import imported_model, is_imported

    source = source.resolve()
    is_checkpoint = (source / MANIFEST_NAME).is_file() or source.parent.name == "checkpoints"
    if choice is not None and (is_checkpoint or is_imported(source)):
        raise ValueError(f"--checkpoint {choice}: {source} is a checkpoint already; leave out one of the two")
    for folder in (source, source.parent):
        if is_imported(folder) and source in (folder, folder / IMPORTED_CHECKPOINT):
            return Subject(checkpoint_folder(folder), imported_model(folder), folder)
    path = source
    if is_checkpoint:
        path, choice = source.parent.parent, source.name
        if source.parent.name != "checkpoints" or not (path / "config.yaml").is_file():
            raise ValueError(
                f"{source}: a checkpoint outside its run directory, whose config.yaml describes the model; expected "
                "RUN_DIR/checkpoints/step_..., a run directory or what `pretrain import` wrote. What to do: put it "
                "back into checkpoints/ of its run"
            )
    run = RunDir.open(path)
    config = check(run.config())
    checkpoint = CheckpointStore(run.checkpoints_path).select(choice)
    if checkpoint is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet; train it with `pretrain resume`")
    return Subject(checkpoint, config.model, run.artifacts_path, run, config)


def save_results(subject: Subject, out: Path | None, text: str) -> Path:
    """Write the results to a new file and return it: ``out``, or ``eval_<checkpoint>_<number>.json``. Nothing that is
    there is overwritten: an ``out`` that came up meanwhile stays, and the file beside it gets a number."""
    from pretrain.config.files import exclusive_write_text

    for path in _names(subject, out):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            exclusive_write_text(path, text)
        except FileExistsError:
            continue
        return path
    raise AssertionError("names are endless")


def _names(subject: Subject, out: Path | None) -> Iterator[Path]:
    if out is None:
        out = subject.folder / f"eval_{subject.checkpoint.name}.json"
    else:
        yield out
    for number in itertools.count(1):
        yield out.with_name(f"{out.stem}_{number}{out.suffix}")
