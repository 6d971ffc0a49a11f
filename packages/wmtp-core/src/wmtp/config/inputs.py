"""Inputs of a config: its URIs, by key.

Names of the hub are told from paths, and all are fixed for a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from attrs import evolve, frozen

from wmtp.config.load import Loaded, located
from wmtp.config.places import build_backends
from wmtp.config.problems import KeyPath, Problem, dotted
from wmtp.config.schema import Config, ModelConfig, StorageConfig
from wmtp.config.tree import components
from wmtp.errors import ConfigError
from wmtp.plugins.contract import ComponentConfig
from wmtp.storage.hub.names import HubName, both_readings, cached_snapshot, plain_name
from wmtp.storage.uris import check_answer, file_path, scheme_of

__all__ = ["Input", "anchored", "hub_names_read", "inputs", "pinned", "plain_hub_name", "with_uris"]

#: kinds of components whose plain ``org/name`` may be one of the hub's; a data set's is as likely a path
_NAMED: Final = ("model_loaders", "tokenizers")
_SQLITE: Final = re.compile(r"sqlite:///(?!/)(?P<path>.+)")


@frozen(kw_only=True)
class Input:
    """A URI in a config.

    Args:
        path: its key.
        kind: of the component that has it.
        uri: as the config has it.
    """

    path: KeyPath
    kind: str
    uri: str

    @property
    def key(self) -> str:
        """Dotted key."""
        return dotted(self.path)


def inputs(config: Config) -> Iterator[Input]:
    """Every URI that a component reads from."""
    for placed in components(config):
        for key in ("uri", *placed.config.uri_keys):
            if isinstance(uri := getattr(placed.config, key, None), str):
                yield Input(path=(*placed.path, key), kind=placed.kind, uri=uri)


def with_uris(config: Config, uris: Mapping[str, str]) -> Config:
    """Put other URIs at some keys of a config (see `Input.key`)."""
    return _mapped(config, (), lambda path, uri: uris.get(dotted(path), uri)) if uris else config


def _mapped(value: Any, path: KeyPath, change: Callable[[KeyPath, str], str]) -> Any:
    """Change the URIs of a config's components.

    What has none to change is returned as it is.
    """
    if isinstance(value, Mapping):
        new = {key: _mapped(element, (*path, key), change) for key, element in value.items()}
        return new if any(new[key] is not value[key] for key in new) else value
    if isinstance(value, tuple | list):
        elements = [_mapped(element, (*path, index), change) for index, element in enumerate(value)]
        return type(value)(elements) if any(new is not old for new, old in zip(elements, value, strict=True)) else value
    if not attrs.has(type(value)) or isinstance(value, type | StorageConfig):  # storage backends read nothing
        return value
    changes: dict[str, Any] = {}
    for attribute in attrs.fields(type(value)):
        if not attribute.init:
            continue
        old = getattr(value, attribute.name)
        here = path if isinstance(value, ModelConfig) and attribute.name == "loader" else (*path, str(attribute.alias))
        if (
            isinstance(value, ComponentConfig)
            and isinstance(old, str)
            and attribute.name in ("uri", "tracking_uri", *value.uri_keys)
        ):
            new = change(here, old)
        else:
            new = _mapped(old, here, change)
        if new is not old:
            changes[str(attribute.alias)] = new
    return evolve(value, **changes) if changes else value


# --- names of the hub


def plain_hub_name(text: str) -> HubName | None:
    """Take a plain ``org/name`` for the hub's where no such path exists.

    Raises:
        ConfigError: a folder ``org`` is there, so it may as well be a path with a mistake; the message has both readings.
    """
    if scheme_of(text) != "file" or (name := plain_name(text)) is None or (path := file_path(text)).exists():
        return None
    if path.parent.exists():
        raise ConfigError(both_readings(text, path, name))
    return name


def hub_names_read(loaded: Loaded) -> tuple[Loaded, list[str]]:
    """Put ``hf://org/name`` in place of each ``org/name`` that is no path here.

    Returns a line for each too. A problem with a text is left to the rules. The files of a config for a service are those of
    another place.
    """
    if loaded.config.launcher.remote:
        return loaded, []
    names: dict[str, str] = {}
    lines = []
    for given in inputs(loaded.config):
        if given.kind not in _NAMED:
            continue
        try:
            name = plain_hub_name(given.uri)
        except ConfigError:
            continue
        if name is not None:
            names[given.key] = name.uri
            lines.append(
                f"{given.key}: {given.uri!r} is no path here, so it is the hub's: {name.uri}; for a folder write ./{given.uri}"
            )
    return evolve(loaded, config=with_uris(loaded.config, names)), lines


# --- what a run is tied to


def pinned(loaded: Loaded) -> dict[str, str]:
    """Find URIs that keep naming what the inputs are now.

    Asks the network.

    Returns:
        such a URI by key, where it is not the one that the config has.

    Raises:
        ConfigError: nothing is there; every problem at once.
        WMTPError: a store could not be asked.
    """
    backends = build_backends(loaded.config.storage, loaded.registry)
    found: dict[str, str] = {}
    problems = []
    for given in inputs(loaded.config):
        scheme = scheme_of(given.uri)
        if scheme == "file":
            continue
        try:
            fixed = check_answer(backends[scheme], "pinned", str, backends[scheme].pinned(given.uri))
        except ConfigError as error:
            text = _text_at(loaded.document.data, given.path)
            path = "" if text == given.uri or plain_name(text) is None else f"; nor is there a folder {file_path(text)}"
            problems += [Problem(given.path, f"{problem}{path}") for problem in error.problems]
            continue
        if fixed != given.uri:
            found[given.key] = fixed
    if problems:
        raise located(loaded.document, problems)
    return found


def _text_at(value: Any, path: KeyPath) -> str:
    """Read the text at a key; empty where there is none."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return ""
    return value if isinstance(value, str) else ""


def anchored(config: Config) -> Config:
    """Make relative paths absolute: the config means the same in every folder."""
    paths = {given.key: _absolute(given.uri, input_folder=True) for given in inputs(config) if scheme_of(given.uri) == "file"}
    config = with_uris(config, paths)
    config = _mapped(config, (), lambda path, text: _absolute_database(text) if path[-1] == "tracking_uri" else text)
    uri, tokens = config.checkpoints.uri, config.data.cache_dir
    return evolve(
        config,
        run=evolve(
            config.run,
            output_dir=_absolute(config.run.output_dir),
            push_to=None if config.run.push_to is None else _absolute(config.run.push_to),
        ),
        data=evolve(config.data, cache_dir=None if tokens is None else _absolute(tokens)),
        checkpoints=evolve(config.checkpoints, uri=None if uri is None else _absolute(uri)),
        storage=evolve(config.storage, cache_dir=_absolute(config.storage.cache_dir)),
    )


def _absolute_database(text: str) -> str:
    match = _SQLITE.fullmatch(text)
    return text if match is None else f"sqlite:///{_absolute(match['path'])}"


def _absolute(text: str, *, input_folder: bool = False) -> str:
    """Make a path absolute.

    Another URI, and a path that begins with ``~`` or ``/``, stay as they are.
    """
    if scheme_of(text) != "file" or re.match("file:", text, re.IGNORECASE):
        return text
    path = file_path(text)
    if input_folder and (snapshot := cached_snapshot(path)) != path:
        return str(snapshot)
    return text if text.startswith(("~", "/")) else os.path.normpath(path) if ".." not in Path(text).parts else str(path)
