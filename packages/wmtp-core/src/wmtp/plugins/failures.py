"""Exceptions out of plugins, said with plugin, file and line."""

from __future__ import annotations

import functools
import linecache
import signal
import sys
import traceback
from collections.abc import Callable
from types import CodeType, FrameType
from typing import ParamSpec, TypeVar

from wmtp.errors import PluginError, WMTPError, described
from wmtp.plugins.components import KINDS
from wmtp.plugins.contract import CONFIG_CLASSES, ComponentConfig, Contract
from wmtp.plugins.loader import load_plugins
from wmtp.plugins.provenance import provenance

__all__ = ["names_plugins", "plugin_failure"]

P = ParamSpec("P")
R = TypeVar("R")


def names_plugins(function: Callable[P, R]) -> Callable[P, R]:
    """Raise `PluginError` for any exception out of a plugin's code.

    What the plugin raised is its ``__cause__``.
    """

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            if (failure := plugin_failure(error)) is None:
                raise
            raise failure from error

    return named


def plugin_failure(error: BaseException) -> PluginError | None:
    """Describe an exception that came out of a plugin's code.

    The traceback tells, so that nothing need be remembered where a hook is called.

    Returns:
        an error of one line, whose ``__cause__`` is the exception; None where it came through no plugin, where WMTP raised it
        on purpose, where memory ran out, for Ctrl-C, and where a signal's handler raised it while a plugin's code ran.
    """
    if isinstance(error, WMTPError | KeyboardInterrupt) or _is_lack_of_memory(error):
        return None
    try:
        components = load_plugins().components
    except WMTPError:  # it may be what is being told of
        return None
    plugins = {_package(provided.cls.__module__): str(provided.plugin) for provided in components}
    del plugins["wmtp"]
    who = name = place = home = line_of_code = ""
    last: type | None = None
    handlers = _signal_handlers()
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code in handlers:  # called at any point of the code around it, which is not to blame
            last, who, name, place, home = None, "", "", "", ""
        component, package = _component(frame), _package(_module(frame))
        if component is not None and not (last is not None and issubclass(last, _class(component))):
            last, name = _class(component), _method(frame, _class(component))
            home = _package(last.__module__)
            who = _title(component, plugins.get(home))
        elif component is None and package in plugins and package != home:
            last, home, name, who = None, package, frame.f_code.co_qualname.rpartition("<locals>.")[2], plugins[package]
        elif component is None and (not home or package != home):
            continue
        place = f"{frame.f_code.co_filename}:{line}"
        line_of_code = linecache.getline(frame.f_code.co_filename, line).strip()
    if not place:
        return None
    what = f"raised {described(error)}"
    if isinstance(error, SystemExit):
        what = f"called sys.exit({error.code!r})"
    elif not str(error):
        what = f"raised {type(error).__name__}: {line_of_code}"
    failure = PluginError(f"{who}: {name} {what} ({place})")
    failure.__cause__ = error
    return failure


def _is_lack_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _signal_handlers() -> set[CodeType]:
    """Collect the code of all signals' handlers."""
    found = set()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if isinstance(handler, signal.Handlers):  # the system's own; its class is called whenever any enum is
            continue
        while isinstance(handler, functools.partial):
            handler = handler.func
        function = handler if hasattr(handler, "__code__") else type(handler).__call__  # a method has the former
        if isinstance(code := getattr(function, "__code__", None), CodeType):
            found.add(code)
    return found


def _component(frame: FrameType) -> object | None:
    """Find the plugin's component whose method a frame runs."""
    code = frame.f_code
    given = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    named = frame.f_globals.get(code.co_qualname.partition(".")[0])  # of a static method, or a function within a method
    for value in (given, named):
        cls = _class(value)
        if not issubclass(cls, Contract) or _package(cls.__module__) == "wmtp":
            continue
        is_method = any(code.co_qualname.startswith(f"{base.__qualname__}.") for base in cls.__mro__)
        if is_method or _package(_module(frame)) == _package(cls.__module__):  # else it is only given to a function of ours
            return value
    return None


def _class(value: object) -> type:
    return value if isinstance(value, type) else type(value)


def _title(component: object, plugin: str | None) -> str:
    kind = next((kind for kind, base in CONFIG_CLASSES.items() if isinstance(component, base)), None)
    if isinstance(component, ComponentConfig) and kind is not None and isinstance(getattr(component, "type", None), str):
        return provenance(component, KINDS[kind])  # a trainer that another class builds has no type
    return plugin or _class(component).__module__


def _method(frame: FrameType, cls: type) -> str:
    """Name a component's method; that around it for a function within one."""
    name = frame.f_code.co_qualname
    scopes = [f"{base.__qualname__}." for base in cls.__mro__]
    within = next((name.removeprefix(scope) for scope in scopes if name.startswith(scope)), frame.f_code.co_name)
    return f"{cls.__name__}.{within.partition('.')[0]}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _package(module: str) -> str:
    return module.partition(".")[0]
