"""MLflow tracker: a local SQLite file or a server."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from wmtp.errors import ConfigError, WMTPError
from wmtp.json_files import read_json_object, reading
from wmtp.redaction import redact
from wmtp.runs.step_file import read_steps
from wmtp.storage.atomic import replace_text
from wmtp.storage.lock import FileLock
from wmtp.tracking.base import TRACKED_ANEW, RunInfo, Tracker
from wmtp.tracking.sender import Sender

if TYPE_CHECKING:
    from mlflow.entities import Run

    from wmtp.tracking.config import MLflowTracker

__all__ = ["ENVIRONMENT", "MLflow", "database_lock", "set_environment"]

logger = logging.getLogger("wmtp")

#: MLflow's own limits
_METRICS_PER_REQUEST: Final = 1000
_PARAMS_PER_REQUEST: Final = 100
_PARAM_LENGTH: Final = 6000
_TAG_LENGTH: Final = 5000
_KEY_LENGTH: Final = 250

#: seconds at the end of a run that a server may be away before the rest is given up
_PATIENCE: Final = 10.0

#: Quiet, no telemetry, and answers within seconds: MLflow's own retries take minutes. A variable that is set already wins.
ENVIRONMENT: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

_STATUS: Final = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class _Point(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class MLflow(Tracker):
    """Writes to one MLflow run, without MLflow's global state.

    The active run and its URI are left alone.

    ``mlflow.json`` in the run directory keeps the run's id, so that a resumed run continues the same MLflow run. MLflow never
    replaces a point: the steps that a killed attempt had sent beyond its last checkpoint are not sent again, and the points
    that it could not send are taken from ``metrics.jsonl``. So every metric has one point a step.
    """

    starts_in_thread = True
    ends_by_itself = True  # every request has a limit, and uploads of a model may take long

    def __init__(self, config: MLflowTracker) -> None:
        self._config = config
        self._sender: Sender[_Point] | None = None
        self._run_id = ""
        #: metric → the last step that an earlier attempt sent
        self._sent_before: Mapping[str, int] = {}
        self._artifacts: list[Path] = []

    def start(self, run: RunInfo) -> None:
        """Open or reopen the MLflow run; see `Tracker.start`.

        Waits for a server that does not answer at most some seconds.
        """
        if problems := [f"tracker.{problem}" for problem in self._config.check()]:
            raise ConfigError(problems)
        self._uri = self._config.tracking_uri or f"sqlite:///{run.run_dir.resolve().parent / 'mlflow.db'}"
        self._run_dir = run.run_dir
        set_environment()
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise WMTPError(
                f"the mlflow tracker needs the package mlflow: {error}; install wmtp-core[train], or set tracker.type = 'jsonl'"
            ) from error
        try:
            with database_lock(_sqlite_file(self._uri)):
                self._client = MlflowClient(self._uri)
                self._open(run)
        except WMTPError:
            raise
        except Exception as error:
            raise WMTPError(f"MLflow at {redact(self._uri)} cannot be used: {_reason(error)}; {self._advice()}") from error
        self._sender = Sender(
            self._send, refused=_refused, reason=_reason, receiver=f"MLflow at {redact(self._uri)}", batch=_METRICS_PER_REQUEST
        )
        if run.resumed_step is not None:
            self._log_missed(run.run_dir / "metrics.jsonl", run.resumed_step)
        self._upload(run.run_dir / "config.toml")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of one step; returns at once.

        MLflow keeps an infinite value as the largest float.
        """
        assert self._sender is not None, "log before start"
        now = time.time_ns() // 1_000_000
        points = (_Point(_key(name), float(value), now, step) for name, value in metrics.items())
        self._sender.put([point for point in points if step > self._sent_before.get(point.key, -1)])

    def log_artifact(self, file: Path) -> None:
        """Upload the file when the run ends."""
        self._artifacts.append(file)

    def finish(self, status: Literal["finished", "stopped", "interrupted", "failed"], model: Path | None) -> None:
        """Send what is left, upload files, and close the run.

        A second call does nothing.
        """
        if self._sender is None:
            return
        sender, self._sender = self._sender, None
        receiver = f"MLflow at {redact(self._uri)}"
        if unsent := sender.close(_PATIENCE):
            logger.warning("%s is still gone: %d metric values were not sent; metrics.jsonl has them all", receiver, unsent)
            return
        try:
            self._client.set_tag(self._run_id, "wmtp.status", status)
            if model is not None:
                self._client.set_tag(self._run_id, "wmtp.model", str(model.resolve()))
            for file in self._artifacts:
                self._upload(file)
            if self._config.log_artifacts:
                self._upload(self._run_dir / "run.json")
                if model is not None:
                    self._upload(model)
            self._client.set_terminated(self._run_id, _STATUS[status])
        except Exception as error:
            logger.warning("%s was not told that the run has ended: %s", receiver, _reason(error))

    def location(self) -> str | None:
        """Command that shows the run, or the address of its page."""
        if not self._run_id:
            return None
        if self._uri.startswith("http"):
            return f"{self._uri.rstrip('/')}/#/experiments/{self._experiment_id}/runs/{self._run_id}"
        # uv sets UV for what it runs, where the mlflow command is not on the user's own path
        return f"{'uv run ' if 'UV' in os.environ else ''}mlflow ui --backend-store-uri {shlex.quote(redact(self._uri))}"

    def _open(self, run: RunInfo) -> None:
        state_file = run.run_dir / "mlflow.json"
        tags = {_key(name): _cut(redact(value), _TAG_LENGTH) for name, value in run.tags.items()}
        params = {_key(name): _cut(redact(value), _PARAM_LENGTH) for name, value in run.params.items()}
        if run.resumed_step is not None:
            tags["wmtp.resumed_step"] = str(run.resumed_step)
        if earlier := self._find(state_file):
            self._reopen(earlier, params, tags)
            return
        self._experiment_id = self._get_or_create_experiment()
        self._run_id = self._client.create_run(self._experiment_id, run_name=run.name, tags=tags).info.run_id
        # to MLflow's client an empty answer is a run without an id, which takes everything and keeps nothing
        if not self._run_id or self._client.get_run(self._run_id).info.run_id != self._run_id:
            raise WMTPError(
                f"{redact(self._uri)} answers, but is no MLflow: asked for a new run, it named none; {self._advice()}"
            )
        state = {"tracking_uri": redact(self._uri), "run_id": self._run_id}
        replace_text(state_file, json.dumps(state, indent=2) + "\n")
        self._log_params(params)

    def _reopen(self, earlier: Run, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._run_id, self._experiment_id = earlier.info.run_id, earlier.info.experiment_id
        # the plain mapping `data.metrics` has no steps
        self._sent_before = {metric.key: metric.step for metric in earlier.to_proto().data.metrics}
        self._client.update_run(self._run_id, status="RUNNING")
        # MLflow never changes a parameter: what differs now becomes a tag
        known = earlier.data.params
        changed = {key: value for key, value in params.items() if known.get(key, value) != value}
        for key, value in changed.items():
            self._client.set_tag(self._run_id, f"wmtp.changed.{key}"[:_KEY_LENGTH], _cut(value, _TAG_LENGTH))
        for key, value in tags.items():
            self._client.set_tag(self._run_id, key, value)
        self._log_params({key: value for key, value in params.items() if key not in known})

    def _find(self, state_file: Path) -> Run | None:
        """Find the MLflow run of an earlier attempt, if any.

        It must be at this address.
        """
        from mlflow.exceptions import MlflowException

        if not state_file.exists():
            return None
        with reading(state_file, TRACKED_ANEW):
            state = read_json_object(state_file, TRACKED_ANEW)
            uri, run_id = str(state["tracking_uri"]), str(state["run_id"])
        if uri != redact(self._uri):
            return None
        try:
            found = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = None
        if found is None or found.info.lifecycle_stage == "deleted":
            logger.warning("MLflow at %s no longer has the run %s; a new one is made", redact(self._uri), run_id)
            return None
        return found

    def _get_or_create_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._config.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # beside the database, not in whatever folder the process runs in
            database = _sqlite_file(self._uri)
            artifacts = None if database is None else (database.parent / "mlflow-artifacts").as_uri()
            try:
                return self._client.create_experiment(name, artifact_location=artifacts)
            except MlflowException as error:
                # another run was quicker
                found = self._client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise WMTPError(
                f"the MLflow experiment {name!r} is deleted; restore it (mlflow experiments restore "
                f"--experiment-id {found.experiment_id}), or set tracker.experiment to another name"
            )
        return found.experiment_id

    def _log_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        rest = iter([Param(key, value) for key, value in params.items()])
        while some := list(islice(rest, _PARAMS_PER_REQUEST)):
            self._client.log_batch(self._run_id, params=some)

    def _log_missed(self, file: Path, last_step: int) -> None:
        """Log steps up to ``last_step`` that an earlier attempt missed."""
        if not file.exists():
            return
        for row in read_steps(file):
            step = int(row["step"])
            if step <= last_step:
                self.log(
                    step, {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
                )

    def _send(self, points: Sequence[_Point]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self._run_id, metrics=[Metric(*point) for point in points])

    def _upload(self, path: Path) -> None:
        try:
            if path.is_dir():
                self._client.log_artifacts(self._run_id, str(path), path.name)
            else:
                self._client.log_artifact(self._run_id, str(path))
        except Exception as error:
            logger.warning("%s was not uploaded to MLflow at %s: %s", path, redact(self._uri), _reason(error))

    def _advice(self) -> str:
        if self._uri.startswith("http"):
            return (
                "check tracker.tracking_uri, that the server runs, and the variables MLFLOW_TRACKING_TOKEN or "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; or set tracker.type = 'jsonl'"
            )
        return "check tracker.tracking_uri, or set tracker.type = 'jsonl'"


def set_environment() -> None:
    """Set `ENVIRONMENT`, which MLflow reads when it is imported.

    MLflow is kept from printing errors that it also raises, too.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow.store.db.utils").addFilter(_is_raised_only)


def _is_raised_only(record: logging.LogRecord) -> bool:
    """Drop tracebacks of failed attempts to write the database.

    It is full or locked.
    """
    return not str(record.msg).startswith("SQLAlchemy database error")


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute() if uri.startswith("sqlite:///") else None


@contextmanager
def database_lock(database: Path | None) -> Iterator[None]:
    """Lock a database.

    Two processes that update a new one break it, and MLflow's own lock covers only a part.
    """
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.parent / f".{database.name}.lock") as lock:
        lock.acquire()
        yield


def _key(name: str) -> str:
    """Turn ``name`` into one that MLflow allows.

    Word characters, ``_-. :/``, and a normal relative path.
    """
    key = re.sub(r"[^\w./ :-]", "_", name)
    if posixpath.normpath(key) != key or key.startswith((".", "/")):
        key = "_" + key.replace("/", "_")
    return key[:_KEY_LENGTH]


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 1] + "…"


def _refused(error: Exception) -> bool:
    """Return True if the same request will always fail.

    Of a deleted run, or with a forbidden value.
    """
    code = getattr(error, "error_code", None)
    return code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE")


def _reason(error: BaseException) -> str:
    """Describe the first cause of an error in one line.

    MLflow's own text repeats a whole request.
    """
    while cause := error.__cause__ or error.__context__:
        error = cause
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next(iter(text.strip().splitlines()), "") or type(error).__name__
    return _cut(redact(line), 300)
