"""Merging of runs from an object store into one MLflow database."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from wmtp.errors import FileError, WMTPError
from wmtp.json_files import read_json_object, writing
from wmtp.storage.uris import stored_files
from wmtp.tracking.mirror import ARTIFACTS, DATABASE
from wmtp.tracking.mlflow import database_lock, set_environment

if TYPE_CHECKING:
    from wmtp.storage import Storage

__all__ = ["Pulled", "pull"]


@frozen(kw_only=True)
class Pulled:
    """Result of `pull`.

    Args:
        database: the MLflow database with all runs.
        new: ids of runs that were not there before.
        changed: ids of runs that have grown since.
        unchanged: how many were there already as they are.
    """

    database: Path
    new: list[str]
    changed: list[str]
    unchanged: int


def pull(storage: Storage, uri: str, database: Path) -> Pulled:
    """Merge all runs at a URI into one database.

    Each as it was tracked: its id, parameters, metrics, tags and artifacts.

    Runs that did not change since the last pull are not read again. Runs of the database that are not at the URI stay.

    Args:
        storage: serves the URI.
        uri: what the runs had as ``tracker.tracking_uri``.
        database: an SQLite file; made if it is not there. Artifacts go to ``mlflow-artifacts`` beside it.

    Raises:
        WMTPError: there are no runs, or one cannot be read; those before it are merged.
    """
    uri = uri.rstrip("/")
    found = {}
    for file in stored_files(storage, uri):
        run_id, _, name = file.name.partition("/")
        if name == DATABASE:
            found[run_id] = file.identity
    if not found:
        raise FileError(f"{uri}: there are no runs; write what was tracker.tracking_uri in their config")
    database = database.absolute()
    record = database.parent / f".{database.name}.pulled.json"
    with database_lock(database):
        seen = read_json_object(record, "remove it, and all is compared again") if record.exists() and database.exists() else {}
        _make_current(database)
        new, changed = [], []
        for run_id, identity in sorted(found.items()):
            if seen.get(f"{uri}/{run_id}") == identity:
                continue
            with tempfile.TemporaryDirectory(prefix="wmtp-") as temporary:
                storage.fetch(f"{uri}/{run_id}", Path(temporary))
                was_there = _merge(Path(temporary), run_id, database, f"{uri}/{run_id}")
            (changed if was_there else new).append(run_id)
            seen[f"{uri}/{run_id}"] = identity
            with writing(record):
                record.write_text(json.dumps(seen, indent=2) + "\n")
    return Pulled(database=database, new=new, changed=changed, unchanged=len(found) - len(new) - len(changed))


def _make_current(database: Path) -> None:
    """Make a database, or migrate it to the installed MLflow.

    Raises:
        WMTPError: it is of a newer MLflow, or damaged.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    set_environment()
    try:
        MlflowClient(f"sqlite:///{database}").search_experiments(max_results=1)
    except MlflowException:
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{database}"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            reason = next(iter(done.stderr.strip().splitlines()[-1:]), "")
            raise WMTPError(
                f"{database} cannot be migrated to the installed MLflow: {reason}; was it written by a newer one?"
            ) from None


def _merge(fetched: Path, run_id: str, database: Path, uri: str) -> bool:
    """Put one run into the database; return whether it was there.

    What the database had of it is replaced.
    """
    source = fetched / DATABASE
    artifacts = database.parent / "mlflow-artifacts" / run_id / ARTIFACTS
    try:
        _make_current(source)
        with closing(sqlite3.connect(source)) as connection:
            row = connection.execute(
                "SELECT experiments.name FROM runs JOIN experiments USING (experiment_id) WHERE run_uuid = ?", [run_id]
            ).fetchone()
    except sqlite3.DatabaseError as error:
        raise WMTPError(f"{uri}/{DATABASE} is damaged: {error}") from error
    if row is None:
        raise WMTPError(f"{uri}/{DATABASE} does not hold the run {run_id}")
    experiment_id = _experiment(database, row[0])
    if (fetched / ARTIFACTS).is_dir():
        shutil.copytree(fetched / ARTIFACTS, artifacts, dirs_exist_ok=True)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("ATTACH DATABASE ? AS pulled", [str(source)])
        with connection:  # all of the run, or nothing
            was_there = connection.execute("SELECT 1 FROM main.runs WHERE run_uuid = ?", [run_id]).fetchone() is not None
            for table, columns in _tables_of_runs(connection):
                names = ", ".join(f'"{column}"' for column in columns)
                connection.execute(f'DELETE FROM main."{table}" WHERE run_uuid = ?', [run_id])
                connection.execute(
                    f'INSERT INTO main."{table}" ({names}) SELECT {names} FROM pulled."{table}" WHERE run_uuid = ?', [run_id]
                )
            connection.execute(
                "UPDATE main.runs SET experiment_id = ?, artifact_uri = ? WHERE run_uuid = ?",
                [experiment_id, artifacts.as_uri(), run_id],
            )
    return was_there


def _tables_of_runs(connection: sqlite3.Connection) -> list[tuple[str, list[str]]]:
    """List the tables about runs, with columns common to both databases.

    ``runs`` comes first.
    """
    found = []
    for (table,) in connection.execute("SELECT name FROM pulled.sqlite_master WHERE type = 'table'").fetchall():
        both = [
            [row[1] for row in connection.execute(f"SELECT * FROM pragma_table_info('{table}', '{schema}')")]
            for schema in ("pulled", "main")
        ]
        columns = [column for column in both[0] if column in both[1]]
        if "run_uuid" in columns:
            found.append((table, columns))
    return sorted(found, key=lambda entry: entry[0] != "runs")


def _experiment(database: Path, name: str) -> int:
    """Return the id of a named experiment, created if needed."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    found = client.get_experiment_by_name(name)
    if found is None:
        return int(client.create_experiment(name, artifact_location=(database.parent / "mlflow-artifacts").as_uri()))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return int(found.experiment_id)
