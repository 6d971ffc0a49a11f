"""Arguments of the public functions, compared with their annotations."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from wmtp.errors import ConfigError

__all__ = ["checks_arguments"]

P = ParamSpec("P")
R = TypeVar("R")

_WORDS = {
    str: "a text",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    os.PathLike: "a path",
    Mapping: "a mapping",
    Callable: "a function",
    type(None): "None",
}


def checks_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments of another kind than annotated, all at once.

    torch is imported where an argument is annotated by it and is given. A missing argument, or one too many, stays Python's
    own `TypeError`.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hint(name: str) -> Any:
        annotation = signature.parameters[name].annotation
        names = {**function.__globals__, "torch": import_module("torch")} if "torch." in annotation else function.__globals__
        return eval(annotation, names)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        problems = [_problem(name, value, hint(name)) for name, value in given.items()]
        if wrong := [problem for problem in problems if problem is not None]:
            raise ConfigError(wrong)
        return function(*args, **kwargs)

    return checked


def _problem(name: str, value: Any, hint: Any) -> str | None:
    if _fits(value, hint):
        return None
    several = [choice for choice in _choices(hint) if _is_several(choice)]
    if isinstance(value, str) and several:
        return f"{name}: a list of texts is wanted; write [{value!r}]"
    came = f"{value!r:.60}" if value is None or isinstance(value, str | bool | int | float) else f"a {_name(type(value))}"
    for choice in several:
        if isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping):
            item = get_args(choice)[0]
            bad = next(each for each in value if not _fits(each, item))
            came = f"a {_name(type(value))} that holds {bad!r:.60}"
    return f"{name}: {came} is not {_described(hint)}"


def _name(type_: type) -> str:
    return type_.__name__ if type_.__module__ == "builtins" else f"{type_.__module__}.{type_.__name__}"


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_several(hint: Any) -> bool:
    origin = get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is None:
        return value is None
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin is Literal:  # a text that is none of them is refused by what reads it, which knows more
        return isinstance(value, tuple({type(choice) for choice in get_args(hint)}))
    if _is_several(hint):
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            return False
        # an iterator could be read once only: its items are left to the function
        return not isinstance(value, Collection) or all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is int or hint is float:
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if origin is Callable or (origin is not None and issubclass(origin, Callable)):
        return callable(value)
    if (origin or hint) is os.PathLike:
        return isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    return isinstance(value, origin or hint)


def _described(hint: Any) -> str:
    """Describe what an annotation takes: ``a text, a path or None``."""
    words = list(dict.fromkeys(word for choice in _choices(hint) for word in _words(choice)))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _words(hint: Any) -> list[str]:
    origin = get_origin(hint)
    if origin is Literal:
        return [repr(choice) for choice in get_args(hint)]
    if _is_several(hint):
        items = _described(get_args(hint)[0])
        plural = {"a text": "texts", "a whole number": "whole numbers", "a mapping": "mappings"}.get(items)
        return [f"a list of {plural}" if plural else "a list of them"]
    kind = type(None) if hint is None else origin or hint
    if kind in _WORDS:
        return [_WORDS[kind]]
    return [f"a {kind.__name__}"]
