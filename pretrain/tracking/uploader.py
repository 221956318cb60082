"""Brings MLflow up to date with a run directory, from the directory's files alone.

``metrics.jsonl`` is the spool: every record carries its own time stamp, and ``mlflow.json`` remembers how
much of it has arrived. Sending a metric twice leaves one copy (same key, time stamp, step and value), so an
upload may be cut off anywhere and repeated, by the training process or long after it.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.files import atomic_write_text
from pretrain.tracking.metrics_log import MetricsTail, Record
from pretrain.tracking.run_files import flatten, latest_config_file, redact_url
from pretrain.tracking.store import embedded_folder, error_code, import_client

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_KEY_TAG = "pretrain.key"
# Limits of MLflow's REST interface; values are kept below what older servers take, as the full
# configuration is an artifact of the run.
_MAX_METRICS, _MAX_PARAMS, _MAX_NAME, _MAX_VALUE = 1000, 100, 250, 500
_CHUNK_BYTES = 1 << 18
_KEPT = ("key", "run_name", "tags", "artifacts")
_FILES = ("config.yaml", "command.txt", "environment.json", "git.json", "git.diff")


class RunUploader:
    """Sends one run directory to one MLflow store. Not thread-safe; methods may raise whatever MLflow raises.

    ``ended`` tells whether this uploader has set a terminal status.
    """

    def __init__(self, run_path: Path, uri: str, experiment: str) -> None:
        self.run_path = run_path
        self.uri = uri
        self._experiment = experiment
        self._client: MlflowClient | None = None
        self._described = False
        self.ended = False
        self._state_path = run_path / "mlflow.json"
        self._state = self._load_state()
        self._tail = MetricsTail(run_path / "metrics.jsonl", self._state["offset"])

    # ---- what is remembered ----------------------------------------------------------------------

    def _load_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except ValueError:
            logger.warning("%s: damaged; the MLflow run is looked up anew", self._state_path)
        shown_uri = redact_url(self.uri)
        if state.get("uri") != shown_uri:
            # Another store knows nothing of this run yet: the whole record is sent there.
            kept: dict[str, Any] = {name: state[name] for name in _KEPT if name in state}
            state = {"run_id": None, "experiment_id": None, "uri": shown_uri, "offset": 0, **kept}
        state.setdefault("key", uuid.uuid4().hex)
        state.setdefault("run_name", self.run_path.name)
        state.setdefault("tags", {})
        state.setdefault("artifacts", [])
        return state

    def _save_state(self) -> None:
        atomic_write_text(self._state_path, json.dumps(self._state, indent=1) + "\n")

    def remember(self, run_name: str, tags: Mapping[str, str], artifacts: Sequence[str]) -> None:
        """Keeps name, tags and artifact paths, so that a later upload needs the run directory alone."""
        self._state["run_name"] = run_name
        self._state["tags"] = {**self._state["tags"], **{name: str(value) for name, value in tags.items()}}
        self._state["artifacts"] = list(dict.fromkeys([*self._state["artifacts"], *map(str, artifacts)]))
        self._save_state()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, None before it exists there."""
        run_id: str | None = self._state["run_id"]
        return run_id

    # ---- sending ---------------------------------------------------------------------------------

    def flush(self) -> int:
        """Sends what is new and returns how many metric values that was."""
        client = self._connect()
        sent = 0
        last: Record | None = None
        while records := self._tail.read(_CHUNK_BYTES):
            metrics = list(_to_metrics(records))
            for start in range(0, len(metrics), _MAX_METRICS):
                self._send(client, metrics[start : start + _MAX_METRICS])
            sent += len(metrics)
            boundaries = [record for record in records if record["event"] in ("start", "end")]
            last = boundaries[-1] if boundaries else last
            # The end is remembered as sent only after artifacts and status have arrived too.
            if last is None or last["event"] != "end":
                self._commit()
        if last is not None and last["event"] == "start":
            client.update_run(self.run_id, status="RUNNING")
            self.ended = False
        elif last is not None:
            self.finish(STATUS.get(last["status"], "FAILED"), last["time"])
        self._commit()
        return sent

    def finish(self, status: str, when: float) -> None:
        """Sends artifacts, then sets ``status`` (FINISHED, KILLED, FAILED), reached at unix time ``when``."""
        client = self._connect()
        for path in self._artifact_files():
            folder = path.parent.relative_to(self.run_path) if path.is_relative_to(self.run_path) else Path()
            name = str(folder).removeprefix("artifacts").strip("./") or None
            client.log_artifact(self.run_id, str(path), name)
        client.set_terminated(self.run_id, status=status, end_time=int(when * 1000))
        self.ended = True

    def _artifact_files(self) -> list[Path]:
        own = [self.run_path / name for name in _FILES]
        listed = [Path(path) for path in self._state["artifacts"]]
        found = [path for folder in ("revisions", "artifacts") for path in (self.run_path / folder).rglob("*")]
        return [path for path in (*own, *listed, *sorted(found)) if path.is_file() and path.stat().st_size]

    def _commit(self) -> None:
        if self._state["offset"] != self._tail.offset:
            self._state["offset"] = self._tail.offset
            self._save_state()

    def rewind(self) -> None:
        """After a failed flush: goes back to what is known to have arrived."""
        self._tail.offset = self._state["offset"]

    def restart(self) -> None:
        """Takes the whole record as not sent yet."""
        self._tail.offset = 0

    def _send(self, client: MlflowClient, metrics: list[Metric]) -> None:
        try:
            client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        except Exception as error:
            if error_code(error) not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
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
            self._client = import_client(self.uri)
        if not self._described:
            self._find_or_create(self._client)
            self._describe(self._client)
            self._described = True
        return self._client

    def _find_or_create(self, client: MlflowClient) -> None:
        if self.run_id is not None:
            try:
                client.get_run(self.run_id)
                return
            except Exception as error:
                if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                    raise
                logger.warning("MLflow run %s is gone from %s; the record is sent anew", self.run_id, self.uri)
                self._state["run_id"], self._state["offset"], self._tail.offset = None, 0, 0
        experiment_id = self._experiment_id(client)
        # A creation whose answer was lost left a run there: it carries our key, saved before the first try.
        self._save_state()
        found = client.search_runs(
            [experiment_id], filter_string=f"tags.`{_KEY_TAG}` = '{self._state['key']}'", max_results=1
        )
        if found:
            run = found[0]
        else:
            tags = {
                _KEY_TAG: self._state["key"],
                "mlflow.source.name": "pretrain",
                "mlflow.source.type": "LOCAL",
            }
            with contextlib.suppress(Exception):  # user ids without a name, as in containers
                tags["mlflow.user"] = getpass.getuser()
            run = client.create_run(
                experiment_id, start_time=self._start_time_ms(), tags=tags, run_name=self._state["run_name"]
            )
        self._state |= {"run_id": run.info.run_id, "experiment_id": experiment_id}
        self._save_state()

    def _experiment_id(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        folder = embedded_folder(self.uri)
        location = None if folder is None else (folder / "artifacts" / _safe(self._experiment)).as_uri()
        return str(client.create_experiment(self._experiment, artifact_location=location))

    def _start_time_ms(self) -> int | None:
        first = MetricsTail(self._tail.path).read(1 << 16)
        return int(first[0]["time"] * 1000) if first else None

    def _describe(self, client: MlflowClient) -> None:
        """Sends parameters and tags. A parameter that a revision changed stays; a tag has the change."""
        from mlflow.entities import Param, RunTag

        revision, path = latest_config_file(self.run_path)
        known = client.get_run(self.run_id).data.params
        params, tags = [], self._tags()
        for name, value in _parameters(path).items():
            if name not in known:
                params.append(Param(name, value))
            elif known[name] != value:
                tags[f"param.{name}.rev{revision}"] = value
        for start in range(0, len(params), _MAX_PARAMS):
            client.log_batch(self.run_id, params=params[start : start + _MAX_PARAMS], synchronous=True)
        entities = [RunTag(_name(name), value) for name, value in tags.items()]
        for start in range(0, len(entities), _MAX_PARAMS):
            client.log_batch(self.run_id, tags=entities[start : start + _MAX_PARAMS], synchronous=True)

    def _tags(self) -> dict[str, str]:
        git, environment = (_read_json(self.run_path / name) for name in ("git.json", "environment.json"))
        tags = {"run_dir": str(self.run_path), **self._state["tags"]}
        if git.get("revision"):
            tags |= {"mlflow.source.git.commit": git["revision"], "git.revision": git["revision"]}
            tags["git.dirty"] = str(bool(git.get("dirty"))).lower()
        for name in ("host", "python", "platform"):
            if name in environment:
                tags[name] = str(environment[name])
        for package, version in environment.get("versions", {}).items():
            tags[f"version.{package}"] = str(version)
        return {name: value[:_MAX_VALUE] for name, value in tags.items()}


def _parameters(config_path: Path) -> dict[str, str]:
    from pretrain.config.freeze import load

    flat = flatten(load(config_path.read_text(encoding="utf-8"), str(config_path)))
    return {_name(name): redact_url(str(value))[:_MAX_VALUE] for name, value in flat.items()}


def _to_metrics(records: Iterable[Record]) -> Iterable[Metric]:
    from mlflow.entities import Metric

    for record in records:
        for name, value in record.get("metrics", {}).items():
            yield Metric(_name(f"{record['event']}/{name}"), value, int(record["time"] * 1000), record.get("step", 0))


def _name(name: str) -> str:
    """A name that MLflow takes: letters, digits and ``_-. :/`` only, at most 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_MAX_NAME]


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).strip(".") or "experiment"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
