"""The run directory: one folder that holds all that a run is, and all that it takes to run it again.

A frozen configuration with numbered revisions, exact commands, environment, git state, logs, metrics and
checkpoints. Everything that touches these paths goes through :class:`RunDir`. Nothing here overwrites a
record silently.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launchers import provenance
from pretrain.config.files import atomic_write_text, exclusive_write_text, fsync_directory, way_out
from pretrain.tracking.run_files import latest_config_file

__all__ = ["RunDir", "RunDirectoryError", "atomic_write_text"]


_CONFIG_IN_THE_MAKING = re.compile(r"\.config\.yaml\..*\.tmp$")


class RunDirectoryError(ValueError):
    """The folder cannot serve as this run's directory. The message names what was found and the way out."""


def _plain(value: Any) -> Any:
    """Tuples become lists, as on the way through YAML, so that fresh and frozen trees compare equal."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class RunDir:
    """Paths and records of one run. Make one with :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, *, created: bool = False) -> None:
        self.path = path
        self.created = created

    # ---- paths -----------------------------------------------------------------------------------

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def revisions_path(self) -> Path:
        return self.path / "revisions"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def artifacts_path(self) -> Path:
        return self.path / "artifacts"

    @property
    def mlflow_path(self) -> Path:
        return self.path / "mlflow.json"

    @property
    def lease_path(self) -> Path:
        return self.path / "lease.json"

    @property
    def logs_path(self) -> Path:
        return self.path / "logs"

    @property
    def lifecycle_path(self) -> Path:
        """What happened to the run as a whole (:mod:`launchers.lifecycle.journal`)."""
        return self.path / "lifecycle.jsonl"

    @property
    def cancel_path(self) -> Path:
        """A user's wish that the run end (:mod:`launchers.lifecycle.cancellation`)."""
        return self.path / "cancel.json"

    @property
    def quarantine_path(self) -> Path:
        """What ranks found damaged in the data and substituted, a file per rank."""
        return self.path / "quarantine"

    def system_metrics_path(self, attempt: int, node: int) -> Path:
        """Samples of one node's CPU, memory, GPUs, network and disk, and of the data of its first rank."""
        return self.path / "system" / f"attempt_{attempt:04d}" / f"node_{node:05d}.jsonl"

    @property
    def offload_path(self) -> Path:
        """Folder of timelines of offloaded optimizer state, ``step_N_rank_R.json`` and ``.png``."""
        return self.path / "offload"

    @property
    def health_path(self) -> Path:
        """Steps whose numbers were bad, a file per step (:mod:`pretrain.training.health_records`)."""
        return self.path / "health"

    def attempt_path(self, attempt: int) -> Path:
        return self.logs_path / f"attempt_{attempt:04d}"

    def rank_log_path(self, attempt: int, rank: int) -> Path:
        return self.attempt_path(attempt) / f"rank_{rank:05d}.log"

    def end_record_path(self, attempt: int, rank: int) -> Path:
        """How a rank that could still write says it ended (:mod:`launchers.lifecycle.end_record`)."""
        return self.attempt_path(attempt) / f"end_rank_{rank:05d}.json"

    def heartbeats_path(self, attempt: int) -> Path:
        """What ranks say of themselves, a file per rank (:mod:`launchers.heartbeat`)."""
        return self.path / "heartbeats" / f"attempt_{attempt:04d}"

    def stacks_path(self, attempt: int, rank: int) -> Path:
        """Stacks of all threads of a rank, appended each time that it gets SIGQUIT."""
        return self.attempt_path(attempt) / f"stacks_rank_{rank:05d}.txt"

    def flight_path(self, attempt: int, rank: int) -> Path:
        """The last collectives of a rank as torch's flight recorder kept them, written at SIGQUIT."""
        return self.attempt_path(attempt) / f"flight_rank_{rank:05d}.json"

    def hang_report_path(self, attempt: int) -> Path:
        """The page that names who hangs where (:mod:`launchers.hang_report`)."""
        return self.path / "reports" / f"hang_attempt_{attempt:04d}.md"

    def trace_path(self, attempt: int) -> Path:
        return self.path / "trace" / f"attempt_{attempt:04d}"

    # ---- making and opening ----------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        tree: Mapping[str, Any],
        *,
        root: str | Path = "runs",
        name: str = "run",
        path: str | Path | None = None,
    ) -> RunDir:
        """Freezes ``tree`` in a new folder ``root/name-YYYYmmdd-HHMMSS``, or at ``path`` when given.

        A ``path`` that already holds exactly this configuration is opened (``created`` is False). Raises
        RunDirectoryError when it holds another configuration (the fields that differ are named) or other
        files, or cannot be made.
        """
        from pretrain.config.freeze import dump

        plain = _plain(tree)
        if path is None:
            folder = _new_folder(Path(root), name)
        else:
            folder = Path(path).absolute()
            if (existing := cls._existing(folder, plain)) is not None:
                return existing
            _make_folder(folder)
        run = cls(folder, created=True)
        try:
            exclusive_write_text(run.config_path, dump(plain))
        except FileExistsError:
            # Someone froze a configuration here since we looked: the same rules apply to theirs.
            existing = cls._existing(folder, plain)
            assert existing is not None
            return existing
        except OSError as error:
            run._undo()
            raise _no_room(run.config_path, error) from error
        try:
            for sub_folder in run._first_folders:
                sub_folder.mkdir(exist_ok=True)
        except OSError as error:
            run.config_path.unlink(missing_ok=True)
            run._undo()
            raise _no_room(folder, error) from error
        fsync_directory(folder)
        return run

    @property
    def _first_folders(self) -> tuple[Path, ...]:
        return (self.logs_path, self.checkpoints_path, self.artifacts_path)

    def _undo(self) -> None:
        """Leaves no empty folders of a run that could not be made."""
        for folder in (*self._first_folders, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()

    @classmethod
    def _existing(cls, folder: Path, tree: dict[str, Any]) -> RunDir | None:
        from pretrain.config.freeze import differences

        # A temporary file is of another process that is freezing its configuration here at this moment.
        if not folder.is_dir() or all(_CONFIG_IN_THE_MAKING.match(entry.name) for entry in folder.iterdir()):
            return None
        if not (folder / "config.yaml").is_file():
            raise RunDirectoryError(
                f"{folder}: the folder is not empty and is not a run directory (no config.yaml); choose another path"
            )
        run = cls.open(folder)
        lines = [str(difference) for difference in differences(run.config(), tree)]
        if not lines:
            return run
        shown = "\n".join(f"  {line}" for line in lines[:30])
        more = f"\n  ... and {len(lines) - 30} more" if len(lines) > 30 else ""
        raise RunDirectoryError(
            f"{folder}: this run directory holds another configuration. "
            f"Fields that differ (there -> asked for):\n{shown}{more}\n"
            f"Nothing was changed. Choose another path for a new run, or continue the one there with "
            f"`pretrain resume {folder}` (fields marked extendable may be changed)."
        )

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Opens an existing run directory. Raises RunDirectoryError: what was expected and what is there."""
        folder = Path(path).absolute()
        if not folder.exists():
            raise RunDirectoryError(f"{folder}: no such folder; expected a run directory (a folder with config.yaml)")
        if not folder.is_dir():
            raise RunDirectoryError(f"{folder}: a file; expected a run directory (a folder with config.yaml)")
        if not (folder / "config.yaml").is_file():
            inside = sorted(child.parent for child in folder.glob("*/config.yaml"))
            hint = f" It holds run directories; choose one, e.g. {inside[-1]}." if inside else ""
            raise RunDirectoryError(f"{folder}: not a run directory: expected a file config.yaml in it.{hint}")
        return cls(folder)

    # ---- configuration ---------------------------------------------------------------------------

    def revision_path(self, number: int) -> Path:
        return self.revisions_path / f"{number:04d}.yaml" if number else self.config_path

    def revision(self) -> int:
        """Number of the highest frozen revision (0: as created)."""
        return latest_config_file(self.path)[0]

    def config(self, revision: int | None = None) -> dict[str, Any]:
        """The frozen tree of a revision (None: the highest). Raises RunDirectoryError when it cannot be read."""
        from pretrain.config.components import with_renamed_fields
        from pretrain.config.freeze import load

        path = latest_config_file(self.path)[1] if revision is None else self.revision_path(revision)
        try:
            return with_renamed_fields(load(path.read_text(encoding="utf-8"), str(path)))
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{path}: the frozen configuration cannot be read: {error}") from error

    def add_revision(self, tree: Mapping[str, Any], changes: Iterable[object]) -> int:
        """Freezes ``tree`` as the next revision with ``changes`` as comment lines; returns its number.

        Raises RunDirectoryError when another process adds the same number at the same time.
        """
        from pretrain.config.freeze import dump

        number = self.revision() + 1
        comments = [f"revision {number}, {_now()}", *(line for c in changes for line in str(c).splitlines())]
        text = "".join(f"# {line}\n" for line in comments) + dump(_plain(tree))
        target = self.revision_path(number)
        try:
            self.revisions_path.mkdir(exist_ok=True)
            exclusive_write_text(target, text)
        except FileExistsError as error:
            raise RunDirectoryError(f"{target}: just added by another process; read it and try again") from error
        except OSError as error:
            raise _no_room(target, error) from error
        return number

    # ---- data --------------------------------------------------------------------------------------------------

    def check_datasets(self, datasets: Mapping[str, Any]) -> None:
        """Freezes fingerprint and shards of the run's data sets at the first start, compares them at every later one.

        ``datasets`` gives by name ``fingerprint``, ``shards`` (name and hash of each) and ``editions``, the
        fingerprints of earlier states that the data set still contains: shards appended since are no difference. Safe
        to call from all ranks at once. Raises RunDirectoryError that names the first shard that differs in each.
        """
        from data_pipeline.store.editions import first_difference

        frozen = self._frozen_once("datasets.json", datasets)
        faults = []
        for name, then in frozen.items():
            now = datasets.get(name)
            if now is None:
                faults.append(f"data set {name!r} is no longer configured")
            elif then["fingerprint"] not in (now["fingerprint"], *now["editions"]):
                where = first_difference(then["shards"], now["shards"]) or "the tokenizer or the block layout differs"
                faults.append(
                    f"data set {name!r} had fingerprint {then['fingerprint']}, now {now['fingerprint']}: {where}"
                )
        if faults:
            raise RunDirectoryError(
                f"{self.path}: the run was created on other data: {'; '.join(faults)}. The order of samples would not "
                "continue. Restore the run's data set (data.path may name a copy of it), or start a new run."
            )

    def check_data(self, fingerprint: str) -> None:
        """Freezes the fingerprint of the order of samples at the first start and compares it at every later one.

        Safe to call from all ranks at once. Raises RunDirectoryError when the order has changed since.
        """
        frozen = self._frozen_once("data.json", {"fingerprint": fingerprint})["fingerprint"]
        if frozen != fingerprint:
            raise RunDirectoryError(
                f"{self.path}: the run was created on data with fingerprint {frozen}, the data set now has "
                f"{fingerprint}: the order of samples would not continue. Restore the run's data set, or start a new "
                "run on the new data."
            )

    def check_initial_weights(self, folder: str, digest: str) -> None:
        """Freezes which weights the run begins with at the first start and compares them at every later one.

        Safe to call from all ranks at once. Raises RunDirectoryError when the folder holds other weights since.
        """
        frozen = self._frozen_once("initial_weights.json", {"folder": folder, "digest": digest})
        if frozen["digest"] != digest:
            raise RunDirectoryError(
                f"{self.path}: the run began with weights of digest {frozen['digest']}, {folder} now has {digest}. "
                "Restore them, or start a new run."
            )

    def initial_weights(self) -> dict[str, str] | None:
        """Folder and digest of the weights that the run began with; None when they came from its seed."""
        path = self.path / "initial_weights.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def _frozen_once(self, name: str, value: Mapping[str, Any]) -> dict[str, Any]:
        path = self.path / name
        with contextlib.suppress(FileExistsError):
            exclusive_write_text(path, _to_json(value))
        return dict(json.loads(path.read_text(encoding="utf-8")))

    # ---- records of an attempt -------------------------------------------------------------------

    def record_attempt(self, attempt: int, command: Sequence[str], *, source: Path | None = None) -> None:
        """Appends ``command`` to command.txt and records environment and git state.

        ``source`` is a folder of the code's git repository (default: this package's). The first attempt's
        records lie in the run directory itself; a later attempt that differs from them writes its own
        beside its logs.
        """
        with open(self.path / "command.txt", "a", encoding="utf-8") as stream:
            words = shlex.join(str(word) for word in command)
            stream.write(f"# attempt {attempt}, {_now()}, in {os.getcwd()}\n{words}\n")
        self._record(attempt, "environment.json", _to_json(provenance.environment()))
        state, diff = provenance.git_state(source or Path(__file__).resolve().parent)
        self._record(attempt, "git.json", _to_json(state))
        self._record(attempt, "git.diff", diff)

    def recorded_versions(self, attempt: int) -> dict[str, str]:
        """Package versions where ``attempt`` was started; empty when there is no record."""
        for folder in (self.attempt_path(attempt), self.path):
            with contextlib.suppress(OSError, ValueError):
                return dict(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["versions"])
        return {}

    def _record(self, attempt: int, file_name: str, text: str) -> None:
        first = self.path / file_name
        try:
            exclusive_write_text(first, text)
        except FileExistsError:
            if first.read_text(encoding="utf-8") != text:
                self.attempt_path(attempt).mkdir(parents=True, exist_ok=True)
                atomic_write_text(self.attempt_path(attempt) / file_name, text)


def _no_room(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path}: cannot be written ({error.strerror}); {way_out(error)}, or choose another path or run.root"
    )


def trace_file(folder: Path, rank: int) -> Path:
    """A rank's file in the trace folder of one attempt."""
    return folder / f"rank_{rank:05d}.jsonl"


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _new_folder(root: Path, name: str) -> Path:
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", name).strip("._") or "run"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    root = root.absolute()
    _make_folder(root)
    for suffix in ["", *(f"-{n}" for n in range(2, 1000))]:
        folder = root / f"{safe}-{stamp}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise RunDirectoryError(f"{root}: no free name for {safe}-{stamp}; set run.name")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunDirectoryError(
            f"{folder}: a file is in the way of this folder; choose another path or run.root"
        ) from error
    except OSError as error:
        raise RunDirectoryError(
            f"{folder}: cannot be made ({error.strerror}); choose another path or run.root"
        ) from error
