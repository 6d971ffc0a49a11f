"""Misspelt and hidden contract names in a plugin's class.

The host would never look at them.

A helper of the plugin's own is free to have any name. It is told from a misspelt name of the contract by its class: the class
has the contract's name beside it, its code reads the helper, the host could not call it, or it has further words in its name.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property, partial, partialmethod
from types import CodeType, FunctionType
from typing import Any, Final

from wmtp.spelling import nearest

__all__ = [
    "former_names",
    "hidden_names",
    "is_contract",
    "is_function",
    "loaded_names",
    "misspelt_names",
    "nearest_name",
    "own_classes",
    "takes",
    "wrong_calls",
]

_SIMILAR: Final = 0.8  # ``needs_loss`` for ``needs_token_loss`` is not; a missing or doubled letter or an s is
_PREFIXES: Final = frozenset({"get", "is"})
_LIBRARIES: Final = frozenset({*sys.stdlib_module_names, "torch", "transformers"})
_LOADS: Final = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_FUNCTIONS: Final = (FunctionType, staticmethod, classmethod, partial, partialmethod)


def is_contract(cls: type) -> bool:
    """Tell whether a class declares the contract's names, not a plugin's."""
    return "_contract_methods" in vars(cls)


def own_classes(cls: type) -> list[type]:
    """List a plugin class's bases written by plugins, nearest first.

    With the class itself, and with mixins.
    """
    return [owner for owner in cls.__mro__ if not is_contract(owner) and (_is_derived(owner) or not _is_library(owner))]


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Find the known name that ``name`` is easily taken for."""
    words = [word for word in name.lower().split("_") if word]
    plain = {other.replace("_", ""): other for other in sorted(known)}
    written = "".join(words)
    close = next((other for other in plain if other == "".join(words[1:]) and words[0] in _PREFIXES), None)
    close = close or next((other for other in plain if _is_exchanged(written, other)), None)
    close = close or nearest(written, plain, cutoff=_SIMILAR)
    if close is None:
        return None
    meant = plain[close]
    more = set(words) - set(meant.split("_"))
    return None if set(meant.split("_")) < set(words) and not more <= _PREFIXES else meant


def _is_exchanged(name: str, other: str) -> bool:
    """Tell whether two neighbouring letters are exchanged.

    In a short name that is a large part of it.
    """
    at = [i for i, (left, right) in enumerate(zip(name, other, strict=False)) if left != right]
    is_pair = len(name) == len(other) > 2 and len(at) == 2 and at[1] == at[0] + 1
    return is_pair and name[at[0]] == other[at[1]] and name[at[1]] == other[at[0]]


def misspelt_names(cls: Any, members: dict[str, Any], owner: type | None = None) -> Iterator[tuple[str, str]]:
    """Find names that are nearly one of the contract's.

    Args:
        cls: the class, with the contract's names.
        members: public names, and what they are.
        owner: the class that has them; None: an instance of ``cls``.

    Returns:
        pairs of name, and name that was meant.
    """
    flags, methods = cls._contract_flags - {"type"}, cls._contract_methods  # a class without a type is refused anyway
    for name, member in members.items():
        if name in cls._contract_flags or name in methods:
            continue
        fitting = {known for known in methods if _may_be(member, _declared(cls, known), is_bound=owner is None)}
        meant = nearest_name(name, flags | fitting)
        if meant is None or meant in members or (owner is None and meant in vars(cls)):
            continue
        functions = [f for other in own_classes(cls) for key, f in vars(other).items() if key != name]
        if name not in loaded_names(functions):
            yield name, meant


def former_names(cls: Any, owner: type) -> Iterator[tuple[str, str]]:
    """Find methods under names that the contract had earlier.

    Args:
        cls: the class, with the contract's names.
        owner: the class that has them.

    Returns:
        pairs of former name, and name of today.
    """
    for name, now in cls._former_methods.items():
        if name in vars(owner) and now not in vars(owner) and _may_be(vars(owner)[name], _declared(cls, now), is_bound=False):
            yield name, now


def hidden_names(cls: Any) -> Iterator[tuple[type, str, type]]:
    """Find contract names in a mixin placed too late among bases.

    Returns:
        the mixin, the name, and the class of the contract.
    """
    for owner in own_classes(cls):
        fields = {attribute.name for attribute in getattr(owner, "__attrs_attrs__", ())}
        if owner is cls or _is_derived(owner) or getattr(owner, "_is_protocol", False):
            continue
        for name in (cls._contract_flags | cls._contract_methods) & vars(owner).keys() - fields:
            found = next(other for other in cls.__mro__ if name in vars(other))
            if is_contract(found) and not getattr(vars(owner)[name], "__isabstractmethod__", False):
                yield owner, name, found


def wrong_calls(cls: Any) -> Iterator[tuple[type, str]]:
    """Find methods that cannot be called as the host calls them.

    `build` is left to `wmtp.plugins.checks`, which knows its arguments by the component's kind.

    Returns:
        the class that has the method, and what is wrong.
    """
    for name in sorted(cls._contract_methods - {"build"}):
        owner = next(other for other in cls.__mro__ if name in vars(other))
        member, declared = vars(owner)[name], _declared(cls, name)
        if is_contract(owner) or not is_function(member) or _may_be(member, declared, is_bound=False):
            continue
        if isinstance(declared, property):
            yield owner, f"{name} is a method, which is not called; write @property above it"
        else:
            yield owner, f"{name} is called as {_call(name, declared)}, and takes {_call('', member)}"


def _call(name: str, member: object) -> str:
    function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()  # type: ignore[arg-type]
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters])).join((name, ""))


def loaded_names(members: Iterable[object]) -> set[str]:
    """Collect the attributes that functions and properties read.

    With what is inside them, and with names that they have as a text.
    """
    return {name for member in members for function in _functions_of(member) for name in _loaded_in(function.__code__)}


@cache
def _loaded_in(code: CodeType) -> frozenset[str]:
    # cached: classes are checked several times in a run, and taking bytecode apart is most of that
    found = {i.argval for i in dis.get_instructions(code) if i.opname in _LOADS}
    found |= {constant for constant in code.co_consts if isinstance(constant, str)}
    return frozenset(found.union(*(_loaded_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))))


def is_function(member: object) -> bool:
    """Tell whether a member of a class or object is callable.

    Properties, classes and modules of torch are not meant.
    """
    return isinstance(member, _FUNCTIONS) or (inspect.isroutine(member) and not isinstance(member, cached_property))


def takes(member: object, count: int, keywords: Iterable[str] = (), *, is_bound: bool = False) -> bool:
    """Tell whether a class's function accepts this number of arguments besides ``self``.

    Args:
        member: as it stands in the class.
        count: arguments by position.
        keywords: and by name.
        is_bound: it belongs to an object, so it gets no ``self``.
    """
    function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
    if not isinstance(function, FunctionType):
        return True  # a partial, or another callable: unknown
    first = 0 if is_bound or isinstance(member, staticmethod) else 1
    try:
        inspect.signature(function, follow_wrapped=False).bind(*(None,) * (first + count), **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def _may_be(member: object, declared: object, *, is_bound: bool) -> bool:
    """Tell whether a plugin's member can stand for a contract's.

    That is a method or a property of the contract.
    """
    if isinstance(declared, property):
        return not is_function(member)
    if not is_function(member):
        return False  # a value or a property cannot be a misspelt method
    function: Callable[..., object] = declared.__func__ if isinstance(declared, staticmethod | classmethod) else declared  # type: ignore[assignment]
    parameters = list(inspect.signature(function).parameters.values())
    is_static = isinstance(declared, staticmethod)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][0 if is_static else 1 :]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return takes(member, len(positional), keywords, is_bound=is_bound) or (
        is_static and takes(member, len(positional), keywords, is_bound=True)
    )


def _declared(cls: type, name: str) -> object:
    return next(vars(owner)[name] for owner in cls.__mro__ if is_contract(owner) and name in vars(owner))


def _is_derived(cls: type) -> bool:
    return any(is_contract(owner) for owner in cls.__mro__)


def _is_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _LIBRARIES


def _functions_of(member: object) -> Iterator[FunctionType]:
    if isinstance(member, property):
        inside: tuple[object, ...] = (member.fget, member.fset)
    elif isinstance(member, staticmethod | classmethod):
        inside = (member.__func__,)
    else:
        inside = (getattr(member, "func", member),)  # of a partial, a cached_property
    for function in inside:
        while function is not None:
            if isinstance(function, FunctionType):
                yield function
            function = getattr(function, "__wrapped__", None)
