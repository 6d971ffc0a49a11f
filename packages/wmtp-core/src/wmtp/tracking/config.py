"""Config classes of the built-in trackers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from wmtp.tracking.base import Tracker

__all__ = ["JsonlTracker", "MLflowTracker"]


@frozen(kw_only=True)
class MLflowTracker:
    """Tracks the run in MLflow.

    Args:
        tracking_uri: a local SQLite file (``sqlite:///…``) or a server (``http(s)://…``). Default: ``mlflow.db`` in
            ``run.output_dir``. Credentials come from MLflow's own variables (``MLFLOW_TRACKING_TOKEN`` …).
        experiment: the experiment's name.
        log_artifacts: also upload the config snapshot and the final model.
    """

    type = "mlflow"
    tracking_uri: str | None = None
    experiment: str = "wmtp"
    log_artifacts: bool = False

    def build(self) -> Tracker:
        """Make the tracker; imports mlflow."""
        from wmtp.tracking.mlflow import MLflow

        return MLflow(self)


@frozen(kw_only=True)
class JsonlTracker:
    """Keeps to the run directory: ``metrics.jsonl`` is all there is. Needs no MLflow."""

    type = "jsonl"

    def build(self) -> Tracker:
        """Make the tracker."""
        from wmtp.tracking.jsonl import Jsonl

        return Jsonl()
