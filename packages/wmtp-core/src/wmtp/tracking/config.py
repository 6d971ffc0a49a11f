"""Config classes of the built-in trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from attrs import field, frozen
from attrs.validators import min_len, optional

from wmtp.plugins.built import built
from wmtp.plugins.components import component
from wmtp.plugins.contract import TrackerConfig
from wmtp.storage.uris import storage_scheme

if TYPE_CHECKING:
    from wmtp.tracking.base import Tracker

__all__ = ["JsonlTracker", "MLflowTracker", "SeveralTrackers", "TensorBoardTracker", "WandbTracker"]

_DATABASES = ("postgresql", "mysql", "mssql")


@frozen(kw_only=True)
class MLflowTracker(TrackerConfig):
    """Tracks the run in MLflow.

    The config, tags, every metric, the config snapshot, the page of ``wmtp report`` and the final model's place are tracked.

    Args:
        tracking_uri: a local SQLite file (``sqlite:///…``), a server (``http(s)://…``) or one of MLflow's other databases
            (``postgresql://…``, ``mysql+pymysql://…``). Default: ``mlflow.db`` in ``run.output_dir``. Credentials of a
            server come from MLflow's own variables (``MLFLOW_TRACKING_TOKEN`` …). With an object store (``s3://…``) the run
            is tracked on its own machine and copied there at each checkpoint and the end; ``wmtp runs pull URI`` merges runs.
        experiment: the experiment's name; made if there is none.
        log_artifacts: also upload ``run.json`` and the final model.
    """

    type = "mlflow"
    own_schemes = ("http", "https", "file", "sqlite", *_DATABASES)
    tracking_uri: str | None = None
    experiment: str = field(default="wmtp", validator=min_len(1))
    log_artifacts: bool = False

    @property
    def _is_mirrored(self) -> bool:
        """MLflow keeps no runs in an object store; `wmtp.tracking.mirror` does."""
        return self.tracking_uri is not None and storage_scheme(self.tracking_uri, self.own_schemes) is not None

    def check(self) -> Iterator[str]:
        """Find wrong values; see `ComponentConfig.check`."""
        if self.tracking_uri is not None and not self._is_mirrored and (problem := _uri_problem(self.tracking_uri)):
            yield f"tracking_uri: {problem}"

    def preload(self) -> None:
        """Import MLflow, which takes seconds."""
        from wmtp.tracking.mlflow import set_environment

        set_environment()
        with suppress(ImportError):
            import mlflow  # noqa: F401

    def build(self) -> Tracker:
        """Make the tracker."""
        if self._is_mirrored:
            from wmtp.tracking.mirror import MirroredMLflow

            return MirroredMLflow(self)
        from wmtp.tracking.mlflow import MLflow

        return MLflow(self)


def _uri_problem(uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        return f"{uri!r} is no URI ({error}); write sqlite:///PATH/mlflow.db, or the address of a server"
    if parts.scheme in ("http", "https"):
        if not host:
            return f"{uri!r} names no host; write {parts.scheme}://HOST:PORT"
        if parts.username is not None:
            return (
                f"the address of {host} holds a user name or a token, which would be saved with the config; "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, instead"
            )
        return None
    if parts.scheme == "sqlite":
        path = uri[len("sqlite:///") :]
        if not uri.startswith("sqlite:///") or not path.strip("/") or path.endswith("/"):
            return f"{uri!r} names no file; write sqlite:///PATH/mlflow.db, with four slashes for an absolute path"
        return None
    if parts.scheme.split("+")[0] in _DATABASES:
        return None
    if parts.scheme in ("", "file"):
        path = (parts.path if parts.scheme else uri).rstrip("/")
        return f"{uri!r} is a path, and MLflow no longer keeps runs in plain files; write sqlite:///{path}/mlflow.db"
    return (
        f"MLflow cannot track to {parts.scheme}:; write sqlite:///PATH/mlflow.db, or the address of a server, http://HOST:5000"
    )


@frozen(kw_only=True)
class JsonlTracker(TrackerConfig):
    """Tracks in the run directory's ``metrics.jsonl`` alone. Needs no MLflow."""

    type = "jsonl"

    def build(self) -> Tracker:
        """Make the tracker."""
        from wmtp.tracking.jsonl import Jsonl

        return Jsonl()


@frozen(kw_only=True)
class TensorBoardTracker(TrackerConfig):
    """Writes event files for TensorBoard. Needs ``wmtp-core[tensorboard]``.

    Args:
        folder: where the runs are, each in a folder of its own name. Default: ``tensorboard`` in ``run.output_dir``.
    """

    type = "tensorboard"
    needs_packages = {"tensorboard": "wmtp-core[tensorboard]"}  # noqa: RUF012
    folder: str | None = field(default=None, validator=optional(min_len(1)))

    def build(self) -> Tracker:
        """Make the tracker."""
        from wmtp.tracking.tensorboard import TensorBoard

        return TensorBoard(self)


@frozen(kw_only=True)
class WandbTracker(TrackerConfig):
    """Tracks the run in Weights & Biases.

    Needs ``wmtp-core[wandb]``, and ``wandb login`` or ``WANDB_API_KEY``.

    Args:
        project: the project's name; made if there is none.
        entity: the user or team that owns it. Default: the user's own.
        mode: ``online``; or ``offline``, which keeps the run in its directory until ``wandb sync``. Default: what
            ``WANDB_MODE`` says, else ``online``.
    """

    type = "wandb"
    needs_packages = {"wandb": "wmtp-core[wandb]"}  # noqa: RUF012
    project: str = field(default="wmtp", validator=min_len(1))
    entity: str | None = None
    mode: Literal["online", "offline"] | None = None

    def build(self) -> Tracker:
        """Make the tracker."""
        from wmtp.tracking.wandb import Wandb

        return Wandb(self)


@frozen(kw_only=True)
class SeveralTrackers(TrackerConfig):
    """Several trackers at once.

    One that fails during the run is reported once; the others continue.

    Args:
        of: the trackers, each in a table ``[[tracker.of]]``.
    """

    type = "several"
    of: tuple[TrackerConfig, ...] = component("trackers", validator=min_len(2))

    def check(self) -> Iterator[str]:
        """Find trackers that are named twice."""
        types = [tracker.type for tracker in self.of]
        for type_ in sorted({type_ for type_ in types if types.count(type_) > 1}):
            yield f"of: {type_!r} is there {types.count(type_)} times; keep one"

    def preload(self) -> None:
        """Import what each of them needs."""
        for tracker in self.of:
            tracker.preload()

    def build(self) -> Tracker:
        """Make the trackers, and one that tells them all."""
        from wmtp.tracking.several import Several

        return Several({tracker.type: built(tracker, "trackers") for tracker in self.of})
