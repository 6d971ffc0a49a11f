"""Weights & Biases tracker, by the package wandb."""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wmtp.errors import WMTPError
from wmtp.json_files import read_json_object, reading, writing
from wmtp.tracking.base import TRACKED_ANEW, RunInfo, Tracker

if TYPE_CHECKING:
    from wmtp.tracking.config import WandbTracker

__all__ = ["Wandb"]

_TAG_LENGTH = 64  # wandb's own limit


class Wandb(Tracker):
    """Writes to one run of Weights & Biases.

    ``wandb.json`` in the run directory keeps its id for a resume.

    wandb never replaces a point, so what an earlier attempt has logged is left out. Its own count of steps only grows; the
    optimizer step is a metric, by which the others are drawn: an evaluation may add a number at an earlier step.
    """

    def __init__(self, config: WandbTracker) -> None:
        self._config = config
        self._run: Any = None
        self._place: str | None = None
        self._logged: Mapping[str, int] = {}

    def start(self, run: RunInfo) -> None:
        """Open or reopen the run; see `Tracker.start`."""
        try:
            wandb: Any = import_module("wandb")
        except ImportError as error:
            raise WMTPError(f"tracker 'wandb': {error}; install wmtp-core[wandb]") from error
        state = run.run_dir / "wandb.json"
        with reading(state, TRACKED_ANEW):
            earlier = read_json_object(state, TRACKED_ANEW)["id"] if state.exists() else None
        settings = {"silent": True, "console": "off", "disable_git": True, "disable_code": True, "login_timeout": 1}
        try:
            self._run = wandb.init(
                project=self._config.project,
                entity=self._config.entity,
                mode=self._config.mode,
                id=earlier or secrets.token_hex(4),
                resume="allow",
                name=run.name,
                dir=str(run.run_dir),
                tags=[name[:_TAG_LENGTH] for name, value in run.tags.items() if value == "true"],
                settings=wandb.Settings(**settings),
            )
        except Exception as error:  # not logged in, no such team, no network: wandb has a class for each
            raise WMTPError(
                f"Weights & Biases cannot be used: {error}; run `wandb login`, set WANDB_API_KEY,"
                " or set tracker.mode = 'offline'"
            ) from error
        with writing(state):
            state.write_text(json.dumps({"id": self._run.id}) + "\n", encoding="utf-8")
        self._run.config.update({**run.params, "tags": dict(run.tags)}, allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._logged = run.logged if earlier else {}
        offline = self._run.settings.mode == "offline"
        self._place = (
            f"wandb sync {shlex.quote(str(Path(self._run.settings.sync_dir).resolve()))}" if offline else self._run.url
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass one step's metrics to wandb, which buffers them offline."""
        assert self._run is not None, "log before start"
        if new := {name: float(value) for name, value in metrics.items() if step > self._logged.get(name, -1)}:
            self._run.log({**new, "step": step})

    def finish(self, status: Literal["finished", "stopped", "interrupted", "failed"], model: Path | None) -> None:
        """Send what is left, and close the run.

        A second call does nothing.
        """
        if self._run is not None:
            self._run.summary.update({"status": status} | ({} if model is None else {"model": str(model)}))
            self._run.finish(exit_code=0 if status in ("finished", "stopped") else 1)
            self._run = None

    def location(self) -> str | None:
        """Return the run's page, or the command that sends it.

        The command is for a run that was kept offline.
        """
        return self._place
