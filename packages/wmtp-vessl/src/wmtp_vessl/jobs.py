"""Launcher for VESSL Cloud Jobs, by VESSL's program ``vesslctl``.

Nothing of it was tried against the service: flags and fields are those that public scripts use.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from wmtp.config.schema import Config
from wmtp.errors import AuthenticationError, ConfigError, PlatformError
from wmtp.launchers.base import LaunchPlan, RemoteLauncher, RunState, RunStatus
from wmtp_vessl import rules
from wmtp_vessl.config import VesslLauncher
from wmtp_vessl.errors import NotFoundError
from wmtp_vessl.render import COMMAND, container_config, environment

__all__ = ["VesslJobs", "newer_lines"]

logger = logging.getLogger("wmtp")

_STATES: Final = {
    "succeeded": RunState.SUCCEEDED,
    "completed": RunState.SUCCEEDED,
    "failed": RunState.FAILED,
    "terminated": RunState.CANCELLED,
    "cancelled": RunState.CANCELLED,
    "running": RunState.RUNNING,
    "terminating": RunState.RUNNING,
}
_MOST_LINES: Final = 1000  # vesslctl gives no more at once
_TIMEOUT: Final = 120.0  # seconds
_NOT_FOUND: Final = re.compile(r"\b404\b|not found", re.IGNORECASE)
_NO_LOGIN: Final = re.compile(
    r"\b(401|403)\b|unauthori[sz]ed|unauthenticated|forbidden|not logged in|auth login", re.IGNORECASE
)


class VesslJobs(RemoteLauncher):
    """VESSL Cloud Jobs, by ``vesslctl`` with its own login.

    ``vesslctl auth login`` logs in.

    Args:
        settings: the launcher's config.
    """

    def __init__(self, settings: VesslLauncher) -> None:
        self._settings = settings

    def inside(self, config: Config) -> Config:
        """With a process for each GPU, and the cache; see `RemoteLauncher.inside`."""
        return container_config(config, self._settings)

    def check(self, config: Config) -> Iterable[str]:
        """Paths, sizes; see `RemoteLauncher.check`."""
        return rules.problems(config, self._settings)

    def plan(self, config: Config) -> LaunchPlan:
        """Make the command line of ``vesslctl``; see `RemoteLauncher.plan`."""
        settings = self._settings
        values = environment(config, settings)
        text = values["WMTP_CONFIG"]
        # how vesslctl takes commas and line ends in --env is not known; base64 has neither
        values["WMTP_CONFIG"] = f"base64:{base64.b64encode(text.encode()).decode()}"
        volumes = {target: str(source) for target, source in settings.mounts.items()}
        if settings.cache.mode != "none":
            volumes[settings.cache.path] = str(settings.cache.source)
        parts = [(target, *source.partition("://")[::2]) for target, source in volumes.items()]
        options = [
            ("--resource-spec", settings.preset),
            ("--image", settings.image),
            *((f"--{kind}-volume", f"{volume}:{target}") for target, kind, volume in parts),
            *(("--tag", tag) for tag in dict.fromkeys((*config.run.tags, *settings.tags))),
            *(("--env", f"{name}={value}") for name, value in values.items()),
            ("--cmd", f"cd /app && {COMMAND}"),
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()
        word = re.sub(r"[^a-z0-9]+", "-", (config.run.name or f"wmtp-{config.trainer.type}").lower()).strip("-")
        lines = [f"  {option} {shlex.quote(value)}" for option, value in [("--name", f"{word}-{digest[:12]}"), *options]]
        shown = [f"# {line}".rstrip() for line in ("WMTP_CONFIG, as text:", "", *text.splitlines())]
        return LaunchPlan(
            text="\n".join([*shown, " \\\n".join(["vesslctl job create", *lines])]) + "\n",
            digest=digest,
            warnings=tuple(rules.warnings(config, settings)),
            facts={"resource spec": f"{settings.preset}, {settings.gpus} GPUs", "image": settings.image},
            record={"image": settings.image, "image_digest": settings.digest},
        )

    def validate(self, config: Config, plan: LaunchPlan) -> Sequence[str]:
        """Check login and resource spec; see `RemoteLauncher.validate`."""
        _vesslctl("auth", "status")
        specs = [str(spec.get("slug")) for spec in _tables(_vesslctl("resource-spec", "list", "--usable-only", "-o", "json"))]
        if self._settings.preset not in specs:
            raise ConfigError(
                f"launcher.preset: VESSL Cloud has no usable resource spec '{self._settings.preset}'; there are:"
                f" {', '.join(sorted(specs)) or 'none'}"
            )
        return ["VESSL Cloud has no validator of jobs to ask; login and resource spec were checked"]

    def find(self, plan: LaunchPlan) -> Sequence[str] | None:
        """Living jobs with the plan's name; see `RemoteLauncher.find`."""
        name = _name(plan)
        jobs = [job for job in _tables(_vesslctl("job", "list", "-o", "json")) if job.get("name") == name]
        return [str(job["slug"]) for job in jobs if "slug" in job and not _state(job)[0].is_over]

    def submit(self, plan: LaunchPlan) -> str:
        """Run the command; see `RemoteLauncher.submit`."""
        before = self.find(plan) or ()
        _, *arguments = shlex.split(plan.text, comments=True)
        _vesslctl(*arguments)
        for _ in range(10):  # a new job is listed a moment later
            new = [slug for slug in self.find(plan) or () if slug not in before]
            if new:
                return new[0]
            time.sleep(self._settings.poll_interval)
        raise PlatformError(f"vesslctl made the job {_name(plan)}, and does not list it; see 'vesslctl job list'")

    def status(self, run: str) -> RunStatus:
        """See `RemoteLauncher.status`."""
        try:
            job = json.loads(_vesslctl("job", "show", run, "-o", "json"))
        except ValueError:
            job = None
        except NotFoundError as error:
            raise ConfigError(f"VESSL Cloud has no job {run}: {error}") from None
        if not isinstance(job, Mapping):
            raise PlatformError(f"vesslctl job show {run} printed no JSON object")
        state, word = _state(job)
        return RunStatus(state=state, word=word)

    def logs(self, run: str, *, tail: int | None, follow: bool) -> Iterator[str]:
        """See `RemoteLauncher.logs`.

        Asks again and again for the last lines: following is reported to fail.
        """
        shown: list[str] = []
        is_first = True
        quiet = 0
        while quiet < 2:
            is_over = not follow or self.status(run).state.is_over
            lines = _vesslctl("job", "logs", "--limit", str(_MOST_LINES), run).splitlines()
            new, may_lack = newer_lines(shown, lines)
            if may_lack and shown:
                logger.warning("more than %d lines came at once: some are missing here", _MOST_LINES)
            shown = lines
            yield from new[max(0, len(new) - tail) :] if is_first and tail is not None else new
            is_first = False
            if not follow:
                return
            quiet = quiet + 1 if is_over and not new else 0
            if quiet < 2:
                time.sleep(self._settings.poll_interval)

    def cancel(self, run: str) -> None:
        """See `RemoteLauncher.cancel`."""
        _vesslctl("job", "terminate", run)


def newer_lines(shown: Sequence[str], lines: Sequence[str]) -> tuple[list[str], bool]:
    """Find the lines of a log's end that follow those already shown.

    Returns:
        the lines, and whether there may be others between.
    """
    for common in range(min(len(shown), len(lines)), 0, -1):
        if list(shown[len(shown) - common :]) == list(lines[:common]):
            return list(lines[common:]), False
    return list(lines), len(lines) >= _MOST_LINES


def _name(plan: LaunchPlan) -> str:
    words = shlex.split(plan.text, comments=True)
    return words[words.index("--name") + 1]


def _state(job: Mapping[str, Any]) -> tuple[RunState, str]:
    word = str(job.get("workloadState") or job.get("state") or job.get("status") or "unknown")
    return _STATES.get(word.lower(), RunState.WAITING), word


def _tables(text: str) -> list[Mapping[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError:
        raise PlatformError(f"vesslctl printed no JSON: {text[:100]!r}") from None
    return [element for element in value if isinstance(element, Mapping)] if isinstance(value, list) else []


def _vesslctl(*arguments: str) -> str:
    """Run the program, and return its standard output.

    Raises:
        ConfigError: it is not installed.
        AuthenticationError: no user is logged in.
        PlatformError: it failed.
    """
    program = shutil.which("vesslctl")
    if program is None:
        raise ConfigError('launcher.backend: "jobs" needs the program vesslctl, which is not on PATH; see docs/vessl.md')
    what = f"vesslctl {' '.join(arguments[:2])}"
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT, stdin=subprocess.DEVNULL, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise PlatformError(f"{what} did not end within {_TIMEOUT:g} s") from None
    except OSError as error:
        raise PlatformError(f"{what} could not be run: {error}") from None
    if done.returncode != 0:
        said = " ".join((done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1].split())[:300]
        if _NO_LOGIN.search(done.stderr):
            raise AuthenticationError(f"{what}: {said}; run 'vesslctl auth login'")
        if _NOT_FOUND.search(done.stderr):
            raise NotFoundError(f"{what}: {said}")
        raise PlatformError(f"{what} failed with {done.returncode}: {said}")
    return done.stdout
