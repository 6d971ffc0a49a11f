"""From TOML files, mappings and ``--set`` to a `Config`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import frozen

from wmtp.config.converter import make_converter
from wmtp.config.nulls import lost_nulls
from wmtp.config.overrides import parse_override
from wmtp.config.problems import Problem, Problems
from wmtp.config.schema import Config, StorageConfig
from wmtp.config.sources import Document, MappingSource, escape
from wmtp.config.toml_file import FileSource, TableSource
from wmtp.config.tree import components, to_mapping
from wmtp.errors import ConfigError
from wmtp.plugins.loader import load_plugins
from wmtp.plugins.registry import Registry
from wmtp.public import public

__all__ = ["ConfigSource", "Loaded", "as_list", "load", "load_config", "load_storage"]

#: a TOML file, a mapping of the same shape, or a config made in Python
ConfigSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Config


@frozen(kw_only=True)
class Loaded:
    """A config, and the sources of its values.

    Args:
        config: structurally right; not yet checked across sections.
        registry: the plugins it was read with, and the classes that a `Config` from Python brought.
        document: the merged sources.
    """

    config: Config
    registry: Registry
    document: Document


@public
def load_config(
    sources: ConfigSource | Sequence[ConfigSource], overrides: Iterable[str] = (), *, registry: Registry | None = None
) -> Config:
    """Read files, mappings and overrides into a `Config`.

    Args:
        sources: TOML files, mappings or a `Config`; the later ones are laid over the earlier ones.
        overrides: ``KEY=VALUE`` texts, as for ``--set``, laid over everything.
        registry: the plugins; default: all that are installed.

    Raises:
        ConfigError: every problem at once, with file, line, key and a hint.
        PluginError: two plugins provide a component of the same name.
    """
    return load(sources, overrides, registry=registry).config


def load(
    sources: ConfigSource | Sequence[ConfigSource], overrides: Iterable[str] = (), *, registry: Registry | None = None
) -> Loaded:
    """As `load_config`, and keep what tells where each value came from."""
    document, registry, problems = _merged(sources, overrides, registry)
    unexpanded = {problem.path for problem in problems}
    try:
        config = make_converter(registry).structure(document.data, Config)
    except Problems as found:
        problems += (problem for problem in found.problems if problem.path not in unexpanded)
    else:
        problems += lost_nulls(config, document.nothing)
        if not problems:
            return Loaded(config=config, registry=registry, document=document)
    raise located(document, problems)


def as_list(sources: ConfigSource | Sequence[ConfigSource] | None) -> Sequence[ConfigSource]:
    """Take one source for a list of it, and None for none."""
    if sources is None:
        return []
    return [sources] if isinstance(sources, str | os.PathLike | Mapping | Config) else sources


def load_storage(sources: ConfigSource | Sequence[ConfigSource], overrides: Iterable[str] = ()) -> StorageConfig:
    """Read the section ``[storage]`` of files that may lack all others.

    Arguments and errors: see `load_config`.
    """
    document, registry, problems = _merged(sources, overrides, None)
    problems = [problem for problem in problems if problem.path[:1] == ("storage",)]
    try:
        config = make_converter(registry).structure(document.data.get("storage", {}), StorageConfig)
    except Problems as found:
        problems += (problem.under("storage") for problem in found.problems)
    else:
        for backend in config.backends:
            problems += (Problem.of_line(line, "storage", backend.type) for line in backend.check())
        if not problems:
            return config
    raise located(document, problems)


def _merged(
    sources: ConfigSource | Sequence[ConfigSource], overrides: Iterable[str], registry: Registry | None
) -> tuple[Document, Registry, list[Problem]]:
    """Merge all sources; return the mapping, the plugins, and unresolved environment references."""
    registry = registry if registry is not None else load_plugins()
    registry.require_unambiguous()
    sources = sources if sources is None else as_list(sources)
    if not isinstance(sources, Sequence) or any(not isinstance(s, str | os.PathLike | Mapping | Config) for s in sources):
        raise ConfigError("a config is a TOML file, a mapping, a Config, or a list of them")
    document = Document()
    files: list[FileSource] = []
    wrong: list[str] = []
    for source in sources:
        try:
            if isinstance(source, Config):
                registry = registry.with_classes((placed.kind, type(placed.config)) for placed in components(source))
                document.merge(to_mapping(source, text=escape), MappingSource())
            elif isinstance(source, Mapping):
                document.merge(source, source if isinstance(source, TableSource) else MappingSource())
            else:
                files.append(FileSource(source))
                if "arms" in files[-1].data and "study" in files[-1].data:
                    raise ConfigError(f"{files[-1].name}: is a study; train it by wmtp study {files[-1].name}")
                document.merge(files[-1].data, files[-1])
        except ConfigError as error:
            wrong += error.problems
        except RecursionError:
            raise ConfigError("a mapping holds itself, or is nested too deeply") from None
    for text in overrides:
        try:
            document.override(parse_override(text))
        except ConfigError as error:
            wrong += error.problems
    if wrong:  # further checks would only give misleading errors
        raise ConfigError(wrong)
    if len(files) == 1:
        document.origins[()] = files[0]  # where a missing section is missed
    return document, registry, document.expand(os.environ)


def located(document: Document, problems: Iterable[Problem]) -> ConfigError:
    """Make the error of a document's problems, with file and line."""
    return ConfigError(list(dict.fromkeys(document.locate(problem) for problem in problems)))
