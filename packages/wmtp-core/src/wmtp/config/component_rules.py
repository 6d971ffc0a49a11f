"""Rules of single components: packages, URIs, and checks of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from attrs import evolve

from wmtp.config.inputs import inputs
from wmtp.config.model_rules import model_problems
from wmtp.config.problems import KeyPath, Problem
from wmtp.config.tree import components
from wmtp.errors import ConfigError, described
from wmtp.plugins.failures import plugin_failure
from wmtp.storage.hub.names import both_readings, plain_name, unclear_target
from wmtp.storage.uris import backend_for, file_path, scheme_of, storage_scheme
from wmtp.storage.walk import not_there, special_kind

if TYPE_CHECKING:
    from wmtp.config.schema import Config
    from wmtp.plugins.registry import Registry

__all__ = ["component_problems"]


def component_problems(config: Config, registry: Registry) -> Iterator[Problem]:
    """Check single components: missing inputs, and each component's own ``check()``."""
    yield from _uris(config, registry)
    if not config.launcher.remote:  # there a path is one of the other machine
        yield from model_problems(config)
    for placed in components(config):
        if not config.launcher.remote:
            yield from _packages(placed.path, placed.config)
        yield from _own_rules(placed.path, placed.config, "check", placed.config.check, registry)
    if (device := config.devices.device) != "auto":
        computes = partial(config.optimizer.check_device, device)
        yield from _own_rules(("optimizer",), config.optimizer, "check_device", computes, registry)
    if (base := config.models.get("base")) is not None and not config.launcher.remote:
        fits = partial(base.loader.check_heads, base.heads)
        yield from _own_rules(("models", "base", "heads"), base.loader, "check_heads", fits, registry)


def _packages(path: KeyPath, config: Any) -> Iterator[Problem]:
    for module, install in config.needs_packages.items():
        if find_spec(module) is None:
            yield Problem((*path, "type"), f"'{config.type}' needs {module}: pip install '{install}'")


def _uris(config: Config, registry: Registry) -> Iterator[Problem]:
    """Report URIs that name nothing, or that no backend serves.

    Every ``uri`` of a component is an input.
    """
    schemes = {scheme: provided.cls for provided in registry.of_kind("storages") for scheme in provided.cls.schemes}
    if config.checkpoints.uri is not None:
        yield from _uri(config.checkpoints.uri, ("checkpoints", "uri"), schemes, must_exist=False)
        scheme = config.checkpoints.uri.partition("://")[0].lower()
        if scheme in schemes and not schemes[scheme].holds_checkpoints:
            yield Problem(
                ("checkpoints", "uri"), f"{scheme}:// keeps no checkpoints; write a folder, or an object store (s3://…)"
            )
    if config.run.push_to is not None:
        yield from _uri(config.run.push_to, ("run", "push_to"), schemes, must_exist=False)
        if problem := unclear_target(config.run.push_to):
            yield Problem(("run", "push_to"), problem)
    for placed in components(config):
        tracking = placed.config.tracking_uri if placed.kind == "trackers" else None
        if isinstance(tracking, str) and (scheme := storage_scheme(tracking, placed.config.own_schemes)):
            yield from _uri(tracking, (*placed.path, "tracking_uri"), schemes, must_exist=False)
            if scheme in schemes and not schemes[scheme].holds_checkpoints:
                yield Problem((*placed.path, "tracking_uri"), f"{scheme}:// keeps no runs; write an object store (s3://…)")
    is_remote = config.launcher.remote  # then a path is one of the other machine
    for given in inputs(config):
        yield from _uri(given.uri, given.path, schemes, must_exist=not is_remote)


def _uri(uri: str, path: KeyPath, schemes: dict[str, Any], *, must_exist: bool) -> Iterator[Problem]:
    try:
        backend_for(uri, schemes).check_uri(uri)
        if must_exist and scheme_of(uri) == "file" and not file_path(uri).exists():
            if (name := plain_name(uri)) is not None:
                kind = "datasets" if path[0] == "datasets" else "models"
                yield Problem(path, both_readings(uri, file_path(uri), evolve(name, kind=kind)))
                return
            relative = "" if str(file_path(uri)) == uri else f" (that is {file_path(uri)})"
            yield Problem(path, f"{uri!r}{relative} does not exist")
        elif must_exist and scheme_of(uri) == "file" and special_kind(file_path(uri)):
            yield Problem(path, not_there(file_path(uri)))
    except ConfigError as error:
        yield from (Problem(path, problem) for problem in error.problems)


def _own_rules(
    path: KeyPath, config: Any, method: str, check: Callable[[], Iterable[str]], registry: Registry
) -> Iterator[Problem]:
    """Run a component's own check, its method of this name; see `wmtp.plugins.hookspecs`."""
    try:
        found = check()
        if isinstance(found, str):
            raise TypeError(f"it must give one line for each problem, in a list, not the text {found!r:.60}")
        lines: Iterable[str] = list(found)
    except Exception as error:
        plugin = registry.provider(type(config))
        owner = f"the plugin {plugin}" if plugin is not None else type(config).__qualname__
        what = f"{method}() of '{config.type}' in {owner} failed: {described(error)}"
        yield Problem(path, str(plugin_failure(error) or what))
        return
    for line in lines:
        yield Problem.of_line(str(line), *path)
