"""Discovery of plugins, with a check of each one's contract before use.

pluggy's own `load_setuptools_entrypoints` is not used: it drops the second of two distributions with the same entry name in
silence, and one plugin that cannot be imported stops everything.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import pluggy

from wmtp.errors import ConfigError, PluginError
from wmtp.plugins import hookspecs
from wmtp.plugins.checks import contract_problem, describe
from wmtp.plugins.components import KINDS
from wmtp.plugins.registry import Plugin, Provided, Registry
from wmtp.spelling import did_you_mean

__all__ = ["GROUP", "load_plugins"]

logger = logging.getLogger("wmtp")

GROUP = "wmtp"
CORE = "wmtp-core"
_PREFIX = "wmtp_"
_UNKNOWN = "unknown"
_Entries = Sequence[tuple[Plugin, metadata.EntryPoint | Exception]]
_HOOKS = tuple(_PREFIX + kind for kind in KINDS)
#: classes that keep the contract, by what they are registered as: a process loads its plugins many times
_sound: WeakKeyDictionary[type, set[str]] = WeakKeyDictionary()
#: ``sys.stdout`` is the whole process's: threads that redirect it one across the other would leave it redirected
_REDIRECTING = threading.RLock()


def load_plugins() -> Registry:
    """Load the components of every installed plugin.

    The built-in ones are the plugin ``wmtp-core``.

    The environment variable ``WMTP_PLUGINS`` (entry names, separated by commas) limits which installed plugins are loaded.
    A plugin that cannot be used is listed in `Registry.broken`; only a config that needs it fails.

    Raises:
        ConfigError: ``WMTP_PLUGINS`` names a plugin that is not installed.
    """
    found, left_out = _selected(_installed(tuple((place, _changed(place)) for place in sys.path)))
    plugins: list[Plugin] = []
    components: list[Provided] = []
    for listed, source in found:
        plugin = listed
        try:
            if isinstance(source, Exception):
                raise source
            # an import that prints must not get into `--json`
            with _REDIRECTING, redirect_stdout(sys.stderr), _in_the_same_folder(plugin):
                classes = _components(source.load())
            by_kind = {kind: tuple(cls.type for cls in of_kind) for kind, of_kind in classes.items() if of_kind}
            plugin = attrs.evolve(plugin, components=by_kind)
            components += [Provided(kind=kind, cls=cls, plugin=plugin) for kind in classes for cls in classes[kind]]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may call sys.exit, or raise anything at all
            plugin = attrs.evolve(plugin, reason=_reason(error))
        plugins.append(plugin)
    return Registry(plugins, components, left_out)


@contextmanager
def _in_the_same_folder(plugin: Plugin) -> Iterator[None]:
    """Go back to the working folder, where relative paths are meant."""
    try:
        before = os.getcwd()
    except OSError:  # it is gone
        yield
        return
    try:
        yield
    finally:
        if os.getcwd() != before:
            os.chdir(before)
            logger.warning("the plugin %s changes the working folder when it is imported; it is set back", plugin)


def _changed(place: str) -> int:
    """Return when a folder of ``sys.path`` last changed.

    Installing a package changes it.
    """
    try:
        return os.stat(place or os.curdir).st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=4)
def _installed(_: tuple[tuple[str, int], ...]) -> _Entries:
    """List the entry points of all distributions, or exceptions of unreadable ones.

    It is kept for each state of ``sys.path``, the argument: a process loads its plugins many times.
    `importlib.metadata.entry_points` would raise for everybody where one package's ``entry_points.txt`` is damaged.
    """
    found: list[tuple[Plugin, metadata.EntryPoint | Exception]] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            if f"[{GROUP}]" not in (distribution.read_text("entry_points.txt") or ""):
                continue
        except Exception:
            continue  # whose it is cannot be known
        name, version = _identity(distribution)
        if name in seen and name != _UNKNOWN:
            continue  # a second copy further down the path, which Python would not import
        seen.add(name)
        try:
            entries = list(distribution.entry_points.select(group=GROUP))
            found += [(Plugin(name=entry.name, distribution=name, version=version), entry) for entry in entries]
        except Exception as error:
            damaged = PluginError(f"its entry_points.txt is damaged ({type(error).__name__}); install the package again")
            found.append((Plugin(name=name, distribution=name, version=version), damaged))
    return sorted(found, key=lambda pair: (pair[0].name != CORE, pair[0].name, pair[0].distribution))


def _identity(distribution: metadata.Distribution) -> tuple[str, str]:
    """Return a distribution's name and version.

    Where it has no readable METADATA file, its folder tells: ``name-1.0.dist-info``.
    """
    folder = getattr(distribution, "_path", None)
    name, _, version = str(getattr(folder, "stem", "")).partition("-")
    try:
        return distribution.metadata["Name"] or name or _UNKNOWN, distribution.version or version or _UNKNOWN
    except Exception:
        return name or _UNKNOWN, version or _UNKNOWN


def _selected(entries: _Entries) -> tuple[_Entries, list[str]]:
    """Split off the entry points that ``WMTP_PLUGINS`` leaves out.

    Returned are the others, and the names of those left out.
    """
    wanted = os.environ.get("WMTP_PLUGINS")
    if wanted is None:
        return entries, []
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    installed = sorted({plugin.name for plugin, _ in entries} - {CORE})
    if unknown := [name for name in names if name not in installed and name != CORE]:
        known = ", ".join(installed) or "none"
        raise ConfigError(
            [f"WMTP_PLUGINS: no plugin '{name}' is installed{_hint(name, installed)}; installed: {known}" for name in unknown]
        )
    return [pair for pair in entries if pair[0].name in (CORE, *names)], [name for name in installed if name not in names]


def _components(plugin: Any) -> dict[str, list[type[Any]]]:
    """Call the hooks of one plugin.

    Raises:
        PluginError: the plugin breaks the contract of `wmtp.plugins.hookspecs`.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a hook takes no arguments: {' '.join(str(error).splitlines()[1:]) or error}") from None
    callers = manager.get_hookcallers(plugin) or []
    for caller in callers:
        if not caller.has_spec():
            raise PluginError(f"there is no hook '{caller.name}'{_hint(caller.name, _HOOKS)}; hooks: {', '.join(_HOOKS)}")
    implemented = {caller.name for caller in callers}
    if forgotten := [name for name in _HOOKS if inspect.isroutine(getattr(plugin, name, None)) and name not in implemented]:
        raise PluginError(f"{forgotten[0]} lacks the decorator @wmtp.hookimpl")
    if not callers:
        name = plugin.__name__ if isinstance(plugin, ModuleType | type) else type(plugin).__name__
        raise PluginError(f"{name} has no function with @wmtp.hookimpl")
    classes: dict[str, list[type[Any]]] = {}
    for caller in callers:
        kind = caller.name.removeprefix(_PREFIX)
        for implementation in caller.get_hookimpls():
            if implementation.wrapper or implementation.hookwrapper:
                raise PluginError(f"{caller.name} is a wrapper; a plugin only adds components")
            classes.setdefault(kind, []).extend(_checked(caller.name, kind, implementation.function()))
    return classes


def _checked(hook: str, kind: str, returned: Any) -> Iterable[type[Any]]:
    """Check that a hook returned an iterable of config classes."""
    if isinstance(returned, type) or not isinstance(returned, Iterable) or isinstance(returned, str):
        raise PluginError(f"{hook} must return a list of config classes, not {describe(returned)}")
    classes = list(returned)
    for cls in classes:
        if isinstance(cls, type) and kind in _sound.get(cls, ()):
            continue
        if problem := contract_problem(kind, cls):
            raise PluginError(f"{hook}: {problem}")
        _sound.setdefault(cls, set()).add(kind)
    return classes


def _hint(name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name, known)
    return f"; {hint}" if hint else ""


def _reason(error: BaseException) -> str:
    """One line: what went wrong, and where in the plugin's code."""
    text = " ".join(str(error).split())
    if isinstance(error, PluginError):
        return text
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SyntaxError):
        return text  # says its place itself
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    frames = [
        f for f in frames if f.filename != __file__ and not f.filename.startswith(os.path.dirname(os.__file__) + "/importlib")
    ]
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text
