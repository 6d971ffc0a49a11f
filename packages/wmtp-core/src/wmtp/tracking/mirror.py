"""MLflow in an object store, by a local copy.

MLflow itself keeps no runs there: they are in a file of this machine, copied to the store as they grow.

Below the tracker's URI is a folder for each run, named by MLflow's id of it: ``mlflow.db``, an SQLite database with nothing but
this run, and ``artifacts/``. `wmtp.tracking.pull` merges many of them into one database for ``mlflow ui``.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import tempfile
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from attrs import evolve

from wmtp.errors import WMTPError
from wmtp.json_files import read_json_object, reading
from wmtp.storage.atomic import replace_text
from wmtp.storage.uris import backend_for
from wmtp.tracking.base import TRACKED_ANEW, RunInfo, Tracker
from wmtp.tracking.mlflow import MLflow

if TYPE_CHECKING:
    from wmtp.storage import Storage
    from wmtp.tracking.config import MLflowTracker

__all__ = ["ARTIFACTS", "DATABASE", "MirroredMLflow", "move_artifacts"]

logger = logging.getLogger("wmtp")

DATABASE: Final = "mlflow.db"
ARTIFACTS: Final = "artifacts"
_FOLDER: Final = "tracking"


class MirroredMLflow(Tracker):
    """MLflow tracker whose local database is copied to the URI.

    It is ``tracking/mlflow.db`` in the run directory, copied at each checkpoint and at the end.

    Args:
        config: its ``tracking_uri`` is of an object store.
    """

    ends_by_itself = True  # as storage does; what is copied may be large

    def __init__(self, config: MLflowTracker) -> None:
        assert config.tracking_uri is not None, "MLflowTracker.build makes this one for an object store"
        self._config = config
        self._uri = config.tracking_uri.rstrip("/")
        self._thread: threading.Thread | None = None
        #: what was copied: file → size and time of change
        self._copied: dict[Path, tuple[int, int]] = {}

    def start(self, run: RunInfo) -> None:
        """Open or reopen the run; see `Tracker.start`.

        A run that was begun on another machine is fetched from the URI first.

        Raises:
            ConfigError: nothing that is installed serves the URI.
            WMTPError: MLflow cannot be used, or the store cannot be reached.
        """
        self._storage: Storage = backend_for(self._uri, run.backends, key="tracker.tracking_uri")
        self._storage.exists(self._uri)  # raises where the store cannot be reached: seconds sooner than MLflow is imported
        self._folder = (run.run_dir / _FOLDER).resolve()
        self._folder.mkdir(exist_ok=True)
        self._database = self._folder / DATABASE
        local = f"sqlite:///{self._database}"
        state = run.run_dir / "mlflow.json"
        if state.exists() and not self._database.exists():
            self._bring_back(state, local)
        self._tracker = MLflow(evolve(self._config, tracking_uri=local))
        self._tracker.start(run)
        self._run_id = json.loads(state.read_text())["run_id"]
        self._copy()  # what cannot be written at the end is better known now

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step; returns at once."""
        self._tracker.log(step, metrics)

    def log_artifact(self, file: Path) -> None:
        """Take a file of the run."""
        self._tracker.log_artifact(file)

    def saved(self, step: int) -> None:
        """Copy the database in the background.

        Unless the last copy is still running.
        """
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._try_to_copy, name="wmtp-tracking-copy", daemon=True)
            self._thread.start()

    def finish(self, status: Literal["finished", "stopped", "interrupted", "failed"], model: Path | None) -> None:
        """Close the MLflow run, and copy all of it."""
        self._tracker.finish(status, model)
        if self._thread is not None:
            self._thread.join()
        if not self._try_to_copy():
            logger.warning("the run's tracking is in %s; copy it with: wmtp run --resume %s", self._folder, self._folder.parent)

    def location(self) -> str | None:
        """Command that shows the run."""
        return f"wmtp runs pull {self._uri}"

    def _bring_back(self, state: Path, local: str) -> None:
        with reading(state, TRACKED_ANEW):
            run_id = str(read_json_object(state, TRACKED_ANEW)["run_id"])
        if not self._storage.exists(f"{self._uri}/{run_id}/{DATABASE}"):
            return
        self._storage.fetch(f"{self._uri}/{run_id}", self._folder)
        move_artifacts(self._database, run_id, self._folder / "mlflow-artifacts")
        fetched = self._folder / ARTIFACTS
        target = self._folder / "mlflow-artifacts" / run_id / ARTIFACTS
        target.parent.mkdir(parents=True, exist_ok=True)
        if fetched.exists() and not target.exists():
            fetched.rename(target)
        replace_text(state, json.dumps({"tracking_uri": local, "run_id": run_id}, indent=2) + "\n")

    def _try_to_copy(self) -> bool:
        try:
            self._copy()
        except (WMTPError, OSError, sqlite3.Error) as error:
            logger.warning("the run's tracking was not copied to %s: %s; it is tried again later", self._uri, error)
            return False
        return True

    def _copy(self) -> None:
        """Artifacts first, the database that names them last."""
        target = f"{self._uri}/{self._run_id}"
        folder = self._folder / "mlflow-artifacts" / self._run_id / ARTIFACTS
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file():
                facts = path.stat()
                seen = (facts.st_size, facts.st_mtime_ns)
                if self._copied.get(path) != seen:
                    self._storage.push(path, f"{target}/{ARTIFACTS}/{path.relative_to(folder).as_posix()}")
                    self._copied[path] = seen
        with tempfile.TemporaryDirectory(prefix="wmtp-") as temporary:
            snapshot = Path(temporary, DATABASE)
            # SQLite's own copy: consistent, although the run keeps writing
            with closing(sqlite3.connect(self._database)) as source, closing(sqlite3.connect(snapshot)) as copy:
                source.backup(copy)
            self._storage.push(snapshot, f"{target}/{DATABASE}")


def move_artifacts(database: Path, run_id: str, folder: Path) -> None:
    """Change a database's artifact folder, for its run and later ones.

    Args:
        database: MLflow's.
        run_id: the run.
        folder: of the artifacts of all runs.
    """
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", [folder.as_uri()])
        connection.execute(
            "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", [(folder / run_id / ARTIFACTS).as_uri(), run_id]
        )
