"""``wmtp start``: from a config to a finished run, in a container that has nothing yet."""

from __future__ import annotations

import base64
import binascii
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli
from attrs import evolve

from wmtp.config.load import load
from wmtp.config.rules import check_loaded, required_models
from wmtp.config.schema import Config
from wmtp.errors import ConfigError
from wmtp.runs.result import Result
from wmtp.startup.machine import check_machine, limited_runtime, sampled, stopped_by_sigterm
from wmtp.startup.prepare import fetched, needed, verify
from wmtp.storage.uris import redact

__all__ = ["VARIABLE", "read_config", "start", "steps"]

logger = logging.getLogger("wmtp")

#: where a launcher puts the config: TOML, or ``base64:`` and the same so encoded
VARIABLE = "WMTP_CONFIG"


def start(files: Sequence[str], overrides: Iterable[str] = ()) -> Result:
    """Check the machine, fetch, verify, train on all its devices, and save what the run leaves.

    It goes on with the newest unfinished run of this config (or of this ``run.name``), where there is one here.

    Args:
        files: TOML files; none: the config is in the variable ``WMTP_CONFIG``.
        overrides: as for ``--set``.

    Raises:
        ConfigError: config, machine or models are not as they must be.
        WMTPError: something could not be fetched, or the training failed.
        KeyboardInterrupt: Ctrl-C; see `wmtp.run`. SIGTERM while things were fetched raises `Terminated`.
    """
    from wmtp.api import run

    home = Path.cwd()
    with stopped_by_sigterm(), limited_runtime():
        config = read_config(files, overrides)
        wanted = needed(config, home)
        check_machine(config, list(dict.fromkeys(fetch.folder for fetch in wanted)))
        ready = fetched(config, wanted, home)
        verify(ready)
        with sampled(home):
            return run(ready, resume="auto")


def read_config(files: Sequence[str], overrides: Iterable[str] = ()) -> Config:
    """The checked config as this machine runs it: of one for a service, what it is inside.

    Raises:
        ConfigError: every problem at once.
    """
    loaded = load(list(files) if files else _from_environment(), overrides)
    launcher = loaded.config.launcher
    if launcher.remote:
        service: Any = launcher.build()
        loaded = evolve(loaded, config=service.inside(loaded.config))
    check_loaded(loaded)
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
    """What `start` would do, by name: from the config alone.

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
    found["verify"] = f"{', '.join(models)}: files whole, vocabularies of one size"
    found["processes"] = "one a GPU" if processes == "auto" else str(processes)
    found["run"] = f"{config.run.output_dir}/{config.run.name or '…'}, resumed where it was begun"
    found["checkpoints"] = config.checkpoints.uri or "in the run directory"
    return found
