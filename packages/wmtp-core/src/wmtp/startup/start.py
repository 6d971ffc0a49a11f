"""``wmtp start``: from a config to a finished run, in containers."""

from __future__ import annotations

import base64
import binascii
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import tomli
from attrs import evolve

from wmtp.config.inputs import hub_names_read
from wmtp.config.load import ConfigSource, load
from wmtp.config.required_models import required_models
from wmtp.config.rules import check_loaded
from wmtp.config.schema import Config
from wmtp.errors import ConfigError
from wmtp.plugins.built import built
from wmtp.public import public
from wmtp.redaction import redact
from wmtp.runs.result import Result
from wmtp.signals import stopped_by_sigterm
from wmtp.startup.machine import check_machine, limited_runtime, sampled
from wmtp.startup.prepare import fetched, needed, verify

__all__ = ["VARIABLE", "read_config", "start", "steps"]

logger = logging.getLogger("wmtp")

#: where a launcher puts the config: TOML, or ``base64:`` and the same so encoded
VARIABLE = "WMTP_CONFIG"


@overload
def start(
    config: ConfigSource | Sequence[ConfigSource] = (), overrides: Iterable[str] = (), *, dry_run: Literal[False] = False
) -> Result: ...


@overload
def start(
    config: ConfigSource | Sequence[ConfigSource] = (), overrides: Iterable[str] = (), *, dry_run: Literal[True]
) -> Mapping[str, str]: ...


@public
def start(
    config: ConfigSource | Sequence[ConfigSource] = (), overrides: Iterable[str] = (), *, dry_run: bool = False
) -> Result | Mapping[str, str]:
    """Check the machine, fetch, verify, train, and save the results.

    The container may have nothing yet; the run trains on all its devices.

    It resumes the newest unfinished run of this config (or of this ``run.name``), where there is one here.

    Args:
        config: as for `wmtp.run`; none: it is in the variable ``WMTP_CONFIG``.
        overrides: as for ``--set``.
        dry_run: only return what would be done, by name.

    Raises:
        ConfigError: config, machine or models are not as they must be.
        WMTPError: something could not be fetched, or the training failed.
        KeyboardInterrupt: Ctrl-C; see `wmtp.run`. SIGTERM while things were fetched raises `Terminated`.
    """
    from wmtp.api import run

    home = Path.cwd()
    if dry_run:
        return steps(read_config(config, overrides), home)
    with stopped_by_sigterm(), limited_runtime():
        checked = read_config(config, overrides)
        wanted = needed(checked, home)
        check_machine(checked, list(dict.fromkeys(fetch.folder for fetch in wanted)))
        ready = fetched(checked, wanted, home)
        verify(ready)
        with sampled(home):
            return run(ready, resume="auto")


def read_config(config: ConfigSource | Sequence[ConfigSource] = (), overrides: Iterable[str] = ()) -> Config:
    """Read and check the config as this machine runs it.

    A config for a service is read as it is inside.

    Raises:
        ConfigError: every problem at once.
    """
    is_given = not isinstance(config, Sequence) or len(config) > 0
    loaded = load(config if is_given else _from_environment(), overrides)
    launcher = loaded.config.launcher
    if launcher.remote:
        service = built(launcher, "launchers")
        loaded = evolve(loaded, config=service.inside(loaded.config))
    loaded, named = hub_names_read(loaded)
    check_loaded(loaded)
    for line in named:
        logger.info("%s", line)
    return loaded.config


def _from_environment() -> Mapping[str, Any]:
    text = os.environ.get(VARIABLE)
    if text is None:
        raise ConfigError(f"no config: name a TOML file, or set {VARIABLE}, as wmtp launch does")
    encoded = text.removeprefix("base64:")
    try:
        return tomli.loads(text if encoded == text else base64.b64decode(encoded, validate=True).decode())
    except (tomli.TOMLDecodeError, binascii.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{VARIABLE}: this is not TOML: {error}") from None


def steps(config: Config, home: Path) -> dict[str, str]:
    """Say what `start` would do, by name: from the config alone.

    Args:
        config: as `read_config` gives it.
        home: the working folder there.
    """
    wanted = needed(config, home)
    folders = dict.fromkeys(str(fetch.folder) for fetch in wanted)
    processes = config.launcher.processes
    found = {"fetch": f"{len(wanted)} to {', '.join(folders)}" if wanted else "nothing"}
    found |= {f"  {fetch.key}": redact(fetch.uri) for fetch in wanted}
    models = ["base", *required_models(config)]
    found["verify"] = f"{', '.join(models)}: files whole"
    found["processes"] = "one a GPU" if processes == "auto" else str(processes)
    found["run"] = f"{config.run.output_dir}/{config.run.name or '…'}, resumed where it was begun"
    found["checkpoints"] = config.checkpoints.uri or "in the run directory"
    return found
