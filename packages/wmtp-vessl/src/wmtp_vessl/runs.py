"""Launcher for VESSL Runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from wmtp.config.schema import Config
from wmtp.errors import ConfigError, PlatformError
from wmtp.launchers.base import LaunchPlan, RemoteLauncher, RunState, RunStatus
from wmtp_vessl import rules
from wmtp_vessl.config import VesslLauncher
from wmtp_vessl.credentials import Credentials
from wmtp_vessl.errors import NotFoundError
from wmtp_vessl.logs import LogReader
from wmtp_vessl.render import TAG, body, container_config, plan_of, run_yaml

if TYPE_CHECKING:
    from wmtp_vessl.client import Client

__all__ = ["VesslRuns"]

logger = logging.getLogger("wmtp")

_STATES: Final = {
    "queued": RunState.WAITING,
    "initializing": RunState.WAITING,
    "pending": RunState.WAITING,
    "running": RunState.RUNNING,
    "idle": RunState.RUNNING,
    "stopping": RunState.RUNNING,
    "waitToBeKilled": RunState.RUNNING,
    "completed": RunState.SUCCEEDED,
    "failed": RunState.FAILED,
    "terminated": RunState.CANCELLED,
}
_ALIVE: Final = tuple(word for word, state in _STATES.items() if not state.is_over)
_LONGEST_OUTAGE: Final = 900.0  # seconds that a followed log waits for a service that does not answer
_METRICS_WINDOW: Final = 600.0  # seconds


class VesslRuns(RemoteLauncher):
    """VESSL Runs, by its HTTP interface.

    Args:
        settings: the launcher's config.
    """

    def __init__(self, settings: VesslLauncher) -> None:
        self._settings = settings

    @cached_property
    def _client(self) -> Client:
        from wmtp_vessl.client import Client  # httpx, which neither plan nor check need

        credentials = Credentials.find(self._settings.organization, self._settings.project)
        return Client(credentials, backoff=min(0.5, self._settings.poll_interval))

    def inside(self, config: Config) -> Config:
        """With a process for each GPU, and the cache; see `RemoteLauncher.inside`."""
        return container_config(config, self._settings)

    def check(self, config: Config) -> Iterable[str]:
        """Paths, sizes; see `RemoteLauncher.check`."""
        return rules.problems(config, self._settings)

    def plan(self, config: Config) -> LaunchPlan:
        """Make the run YAML; see `RemoteLauncher.plan`."""
        spec = run_yaml(config, self._settings)
        return plan_of(config, self._settings, spec, warnings=list(rules.warnings(config, self._settings)))

    def validate(self, config: Config, plan: LaunchPlan) -> Sequence[str]:
        """Check credentials, cluster and preset, then ask the service's validator.

        Credentials are token, organization and project; see `RemoteLauncher.validate`.
        """
        client, settings = self._client, self._settings
        self._known("organization", client.credentials.organization, client.organizations())
        self._known("project", client.credentials.project, client.projects())
        clusters = {str(cluster.get("name")): cluster for cluster in client.clusters()}
        self._known("cluster", settings.cluster, clusters)
        return [*self._check_preset(clusters[settings.cluster]), *self._check_form(plan)]

    def _known(self, key: str, name: str, there: Iterable[str]) -> None:
        names = sorted(there)
        if name not in names:
            raise ConfigError(f"launcher.{key}: VESSL has no '{name}' for you; there are: {', '.join(names) or 'none'}")

    def _check_preset(self, cluster: Mapping[str, Any]) -> Iterator[str]:
        try:
            presets = {str(preset.get("name")): preset for preset in self._client.presets(cluster["id"])}
        except (NotFoundError, KeyError):
            yield f"launcher.preset: VESSL does not list the presets of {self._settings.cluster}; it was not checked"
            return
        wanted = self._settings
        shown = ", ".join(f"{name} ({_gpus(preset)})" for name, preset in sorted(presets.items()))
        if wanted.preset not in presets:
            raise ConfigError(
                f"launcher.preset: the cluster {wanted.cluster} has no '{wanted.preset}'; there are: {shown or 'none'}"
            )
        has = presets[wanted.preset].get("gpu_limit")
        if isinstance(has, int | float) and has < wanted.gpus:
            raise ConfigError(
                f"launcher.preset: {wanted.preset} has {has:g} GPUs, and launcher.gpus = {wanted.gpus}; there are: {shown}"
            )

    def _check_form(self, plan: LaunchPlan) -> Iterator[str]:
        try:
            is_valid, errors = self._client.form_errors(body(plan))
        except PlatformError as error:
            yield f"VESSL's own validator gave no answer: {error}"
            return
        wrong = [
            f"launcher: VESSL says of {error.get('attribute') or error.get('name')}: {error.get('message', 'it is missing')}"
            for kind in ("decode_errors", "validation_errors", "not_injected_errors")
            for error in errors.get(kind) or ()
        ]
        if wrong or not is_valid:
            raise ConfigError(wrong or "launcher: VESSL's validator refuses the plan, and does not say why")
        yield from (f"VESSL's validator says: {w.get('attribute')}: {w.get('message')}" for w in errors.get("warnings") or ())

    def find(self, plan: LaunchPlan) -> Sequence[str] | None:
        """Find the project's living runs with the plan's tag; see `RemoteLauncher.find`."""
        tag = TAG.format(plan.digest[:12])
        return [str(run["id"]) for run in self._client.runs(_ALIVE) if _is_alive(run) and _has_tag(run, tag)]

    def submit(self, plan: LaunchPlan) -> str:
        """Send the YAML; see `RemoteLauncher.submit`."""
        return str(self._client.create(body(plan))["id"])

    def status(self, run: str) -> RunStatus:
        """See `RemoteLauncher.status`."""
        found = self._run(run)
        word = str(found.get("status"))
        state = _STATES.get(word)
        if state is None:
            logger.warning("run %s: VESSL calls its status '%s', which is not known here; it counts as running", run, word)
        reason = found.get("status_reason") or found.get("message")
        return RunStatus(state=state or RunState.RUNNING, word=word, reason=str(reason) if reason else None)

    def _run(self, run: str) -> Mapping[str, Any]:
        try:
            return self._client.run(run)
        except NotFoundError as error:
            where = f"{self._client.credentials.organization}/{self._client.credentials.project}"
            raise ConfigError(f"VESSL has no run {run} in {where}: {error}") from None

    def logs(self, run: str, *, tail: int | None, follow: bool) -> Iterator[str]:
        """See `RemoteLauncher.logs`."""
        self._run(run)
        reader = LogReader(lambda start, end, limit: self._client.logs(run, start, end, limit))
        if tail is not None:
            yield from reader.tail(tail)
        elif not follow:
            yield from reader.new()
        if follow:
            yield from self._follow(reader, run)

    def _follow(self, reader: LogReader, run: str) -> Iterator[str]:
        """Follow a log through outages of the service.

        They may be longer than the client's own patience: what was read stays read.
        """
        lost_at: float | None = None

        def pause() -> None:
            nonlocal lost_at
            lost_at = None
            time.sleep(self._settings.poll_interval)

        while True:
            try:
                yield from reader.follow(pause, lambda: self.status(run).state.is_over)
                return
            except PlatformError as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _LONGEST_OUTAGE:
                    raise
                logger.warning("%s; trying again", error)
                time.sleep(self._settings.poll_interval)

    def cancel(self, run: str) -> None:
        """See `RemoteLauncher.cancel`."""
        self._run(run)
        self._client.terminate(run)

    def metrics(self, run: str) -> Mapping[str, float]:
        """Return the last value of each of the service's series; see `RemoteLauncher.metrics`."""
        now = time.time()
        series = self._client.system_metrics(run, now - _METRICS_WINDOW, now)
        values: dict[str, float] = {}
        for key, table in series.items():
            points = table.get("series") if isinstance(table, Mapping) else None
            numbers = [point for point in points or () if isinstance(point.get("value"), int | float)]
            if numbers:
                unit = f" ({table['unit']})" if table.get("unit") else ""
                values[f"{table.get('label') or key}{unit}"] = float(max(numbers, key=_when)["value"])
        return values


def _when(point: Mapping[str, Any]) -> float:
    time_ = point.get("timestamp")
    return float(time_) if isinstance(time_, int | float) else 0.0


def _gpus(preset: Mapping[str, Any]) -> str:
    count, kind = preset.get("gpu_limit"), preset.get("gpu_type")
    return f"{count:g} × {kind}" if isinstance(count, int | float) and count and kind else f"{count or 0} GPUs"


def _is_alive(run: Mapping[str, Any]) -> bool:
    state = _STATES.get(str(run.get("status")))
    return state is None or not state.is_over


def _has_tag(run: Mapping[str, Any], tag: str) -> bool:
    tags = [str(entry.get("name") if isinstance(entry, Mapping) else entry) for entry in run.get("tags") or ()]
    spec = run.get("run_spec")
    return tag in tags or (isinstance(spec, Mapping) and tag in str(spec.get("yaml_spec")))
