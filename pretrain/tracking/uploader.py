"""Brings MLflow up to date with a run directory, from the directory's files alone.

The files are the spool: every record carries its own time stamp, and ``mlflow.json`` remembers how much of each has
arrived. Sending a metric twice leaves one copy (same key, time stamp, step and value), so an upload may be cut off
anywhere and repeated, by the training process or long after it.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.tracking.convert import fitting_name
from pretrain.tracking.lifecycle import Status, lifecycle_tags, run_status
from pretrain.tracking.lock import sender_lock
from pretrain.tracking.metrics_log import Record
from pretrain.tracking.run_files import flatten, latest_config_file, redact_url
from pretrain.tracking.spool import LOCK, Spool
from pretrain.tracking.store import embedded_folder, error_code, import_client

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

_KEY_TAG = "pretrain.key"
# Limits of MLflow's REST interface; values are kept below what older servers take, as the full
# configuration is an artifact of the run.
_MAX_METRICS, _MAX_PARAMS, _MAX_VALUE = 1000, 100, 500
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# One file may be refused for its own sake; after so many in a row it is the place where files go.
_MAX_FAILED_FILES = 3


class ArtifactsError(RuntimeError):
    """The store has values and status, and could not take files; its cause is the first refusal."""


class RunUploader:
    """Sends one run directory to one MLflow store. Not thread-safe; methods may raise whatever MLflow raises.

    ``lock_timeout_s``: how long to wait for another sender of the same run.
    """

    def __init__(
        self,
        run_path: Path,
        uri: str,
        experiment: str,
        *,
        request_timeout_s: float = 60.0,
        lock_timeout_s: float = 0.0,
    ) -> None:
        self.run_path = run_path
        self.uri = uri
        self._experiment = experiment
        self._request_timeout_s = request_timeout_s
        self._lock_timeout_s = lock_timeout_s
        self._client: MlflowClient | None = None
        self._described: str | None = None
        self._tags_sent: dict[str, str] = {}
        self._spool = Spool(run_path, uri)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, None before it exists there."""
        run_id: str | None = self._spool.state["run_id"]
        return run_id

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment, None before the run exists there."""
        experiment_id: str | None = self._spool.state["experiment_id"]
        return experiment_id

    def remember(self, run_name: str, tags: Mapping[str, str], artifacts: Sequence[str]) -> None:
        """Keeps name, tags and artifact paths, so that a later upload needs the run directory alone."""
        with self._alone():
            state = self._spool.state
            state["run_name"] = run_name
            state["tags"] = {**state["tags"], **{name: str(value) for name, value in tags.items()}}
            state["artifacts"] = list(dict.fromkeys([*state["artifacts"], *map(str, artifacts)]))
            self._spool.save()

    def restart(self) -> None:
        """Takes the whole record as not sent yet."""
        with self._alone():
            self._spool.forget()
            self._spool.save()

    # ---- sending ---------------------------------------------------------------------------------

    def flush(self) -> int:
        """Sends all that is new and returns how many metric values that was.

        Raises BusyError when another process is sending this run, and what MLflow raises.
        """
        sent, is_done = 0, False
        while not is_done:
            number, is_done = self.step()
            sent += number
        return sent

    def step(self) -> tuple[int, bool]:
        """Sends one parcel of limited size; returns the number of values and whether it was the last one for now.

        With the last one tags and status follow, and files once the run has ended. What has arrived is noted at once.
        Raises as :meth:`flush`; ArtifactsError when all but files has arrived.
        """
        with self._alone():
            client = self._connect()
            journal = self._spool.journal()
            parcel = self._spool.read(journal)
            from mlflow.entities import Metric

            metrics = [Metric(v.name, v.value, int(v.time * 1000), v.step) for v in parcel.values]
            for start in range(0, len(metrics), _MAX_METRICS):
                self._send(client, metrics[start : start + _MAX_METRICS])
            self._spool.arrived(parcel)
            self._spool.save()
            if parcel.is_last:
                self._settle(client, journal, parcel.boundary)
            return len(metrics), parcel.is_last

    def finish_unrecorded(self, status: Status) -> None:
        """Sets ``status`` where the run's own record could not take its end, as on a full disk."""
        with self._alone():
            journal, boundary = self._spool.journal(), self._spool.state["boundary"]
            if not journal and (boundary is None or boundary["event"] != "end"):
                self._set_status(self._connect(), status)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return _Alone(self._spool, self.run_path / LOCK, self._lock_timeout_s)

    def _settle(self, client: MlflowClient, journal: list[Record], boundary: Record | None) -> None:
        """Tags and status as the records now say."""
        tags = lifecycle_tags(journal, boundary)
        changed = {name: value for name, value in tags.items() if self._tags_sent.get(name) != value}
        if changed:
            self._send_tags(client, changed)
            self._tags_sent |= changed
        status = run_status(journal, boundary)
        if status is not None and status.name != self._spool.state["status"]:
            self._set_status(client, status)
        elif self._spool.state["unclosed"]:
            self._close(client)

    def _set_status(self, client: MlflowClient, status: Status) -> None:
        if status.is_terminal:
            client.set_terminated(self.run_id, status=status.name, end_time=int(status.since * 1000))
        else:
            client.update_run(self.run_id, status=status.name)
        self._spool.state |= {"status": status.name, "unclosed": status.is_terminal}
        self._spool.save()
        if status.is_terminal:
            self._close(client)

    def _close(self, client: MlflowClient) -> None:
        """What follows a terminal status. It comes after: where files go may be another place, out of reach from here,
        and an ended run must not be shown as running for that."""
        try:
            self._remove_duplicates(client)
        finally:
            self._send_artifacts(client)
        self._spool.state["unclosed"] = False
        self._spool.save()

    def _send_artifacts(self, client: MlflowClient) -> None:
        """Sends files that have changed since they were sent; each is noted, so that a slow server gets on.

        Raises ArtifactsError when some could not be sent.
        """
        first: Exception | None = None
        num_failed = in_a_row = 0
        unsent = self._spool.unsent_artifacts()
        for path, version in unsent:
            folder = path.parent.relative_to(self.run_path) if path.is_relative_to(self.run_path) else Path()
            name = str(folder).removeprefix("artifacts").strip("./") or None
            try:
                client.log_artifact(self.run_id, str(path), name)
            except Exception as error:
                first = first or error
                num_failed, in_a_row = num_failed + 1, in_a_row + 1
                if in_a_row == _MAX_FAILED_FILES:
                    break
                continue
            in_a_row = 0
            self._spool.state["sent_artifacts"][str(path)] = version
            self._spool.save()
        if first is not None:
            left = len(self._spool.unsent_artifacts())
            raise ArtifactsError(
                f"{left} of the run's files could not be sent: {type(first).__name__}: {first}"
            ) from first

    def _send(self, client: MlflowClient, metrics: list[Metric]) -> None:
        try:
            client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        except Exception as error:
            if error_code(error) not in _REFUSED:
                raise
            _check_active(client.get_run(self.run_id))
            # One value that the server refuses must not hold up all that follow it.
            if len(metrics) == 1:
                logger.warning("MLflow refused metric %s: %s", metrics[0].key, error)
                return
            middle = len(metrics) // 2
            self._send(client, metrics[:middle])
            self._send(client, metrics[middle:])

    # ---- the run in MLflow -----------------------------------------------------------------------

    def _connect(self) -> MlflowClient:
        if self._client is None:
            self._client = import_client(self.uri, self._request_timeout_s)
        if self._described is None or self._described != self.run_id:
            self._describe(self._client, self._find_or_create(self._client))
            self._described, self._tags_sent = self.run_id, {}
        return self._client

    def _find_or_create(self, client: MlflowClient) -> Any:
        """The run as MLflow has it."""
        state = self._spool.state
        if self.run_id is not None:
            try:
                run = client.get_run(self.run_id)
                _check_active(run)
                return run
            except Exception as error:
                if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                    raise
                shown = redact_url(self.uri)
                logger.warning("MLflow run %s is gone from %s; the record is sent anew", self.run_id, shown)
                state["run_id"] = None
                self._spool.forget()
        experiment_id = self._experiment_id(client)
        # A creation whose answer was lost left a run there: it carries our key, saved before the first try.
        self._spool.save()
        found = self._own_runs(client, experiment_id)
        if found:
            run = found[0]
        else:
            tags = {
                _KEY_TAG: state["key"],
                "mlflow.source.name": "pretrain",
                "mlflow.source.type": "LOCAL",
            }
            with contextlib.suppress(Exception):  # user ids without a name, as in containers
                tags["mlflow.user"] = getpass.getuser()
            origin = self._spool.origin()
            run = client.create_run(
                experiment_id,
                start_time=None if origin is None else int(origin * 1000),
                tags=tags,
                run_name=state["run_name"],
            )
        state |= {"run_id": run.info.run_id, "experiment_id": experiment_id}
        self._spool.save()
        return run

    def _own_runs(self, client: MlflowClient, experiment_id: str) -> list[Any]:
        """Runs with our key, in a fixed order."""
        text = f"tags.`{_KEY_TAG}` = '{self._spool.state['key']}'"
        return sorted(client.search_runs([experiment_id], filter_string=text), key=lambda run: str(run.info.run_id))

    def _remove_duplicates(self, client: MlflowClient) -> None:
        """A creation that a slow server carried out after it was given up, and tried again, leaves an empty run."""
        for run in self._own_runs(client, str(self.experiment_id)):
            if run.info.run_id != self.run_id and not run.data.metrics:
                client.delete_run(run.info.run_id)

    def _experiment_id(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            folder = embedded_folder(self.uri)
            location = None if folder is None else (folder / "artifacts" / _safe(self._experiment)).as_uri()
            try:
                return str(client.create_experiment(self._experiment, artifact_location=location))
            except Exception as error:
                # Another run has just made it.
                if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(self._experiment)
                assert experiment is not None
        if experiment.lifecycle_stage == "deleted":
            raise ValueError(
                f"tracking.experiment: the experiment {self._experiment!r} was deleted at {redact_url(self.uri)}. "
                f"Restore it (mlflow experiments restore -x {experiment.experiment_id}), then: "
                f"pretrain tracking sync {self.run_path}"
            )
        return str(experiment.experiment_id)

    def _describe(self, client: MlflowClient, run: Any) -> None:
        """Sends parameters and tags. A parameter that a revision changed stays; a tag has the change."""
        from mlflow.entities import Param

        revision, path = latest_config_file(self.run_path)
        known = run.data.params
        params, tags = [], self._tags()
        for name, value in _parameters(path).items():
            if name not in known:
                params.append(Param(name, value))
            elif known[name] != value:
                tags[f"param.{name}.rev{revision}"] = value
        for start in range(0, len(params), _MAX_PARAMS):
            client.log_batch(self.run_id, params=params[start : start + _MAX_PARAMS], synchronous=True)
        self._send_tags(client, tags)

    def _send_tags(self, client: MlflowClient, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(fitting_name(name), value[:_MAX_VALUE]) for name, value in tags.items()]
        for start in range(0, len(entities), _MAX_PARAMS):
            client.log_batch(self.run_id, tags=entities[start : start + _MAX_PARAMS], synchronous=True)

    def _tags(self) -> dict[str, str]:
        git, environment = (_read_json(self.run_path / name) for name in ("git.json", "environment.json"))
        tags = {"run_dir": str(self.run_path), **self._spool.state["tags"]}
        if git.get("revision"):
            tags |= {"mlflow.source.git.commit": git["revision"], "git.revision": git["revision"]}
            tags["git.dirty"] = str(bool(git.get("dirty"))).lower()
        for name in ("host", "python", "platform"):
            if name in environment:
                tags[name] = str(environment[name])
        for package, version in environment.get("versions", {}).items():
            tags[f"version.{package}"] = str(version)
        return tags


class _Alone:
    """The sender's lock, and the state as the last sender left it: what failed half-way is not remembered."""

    def __init__(self, spool: Spool, path: Path, timeout_s: float) -> None:
        self._spool = spool
        self._lock = sender_lock(path, timeout_s)

    def __enter__(self) -> None:
        self._lock.__enter__()
        self._spool.load()

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)


def _check_active(run: Any) -> None:
    if run.info.lifecycle_stage == "deleted":
        raise ValueError(
            f"the run {run.info.run_id} was deleted in MLflow. To track it again, restore it there "
            f"(mlflow runs restore --run-id {run.info.run_id}), then: pretrain tracking sync RUN"
        )


def _parameters(config_path: Path) -> dict[str, str]:
    from pretrain.config.freeze import load

    flat = flatten(load(config_path.read_text(encoding="utf-8"), str(config_path)))
    return {fitting_name(name): redact_url(str(value))[:_MAX_VALUE] for name, value in flat.items()}


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).strip(".") or "experiment"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
