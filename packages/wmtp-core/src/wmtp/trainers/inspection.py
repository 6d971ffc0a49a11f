"""Static checks of a trainer's methods. Imports no torch.

They find mistakes that would show late or never.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from wmtp.plugins.names import is_function, loaded_names, nearest_name, own_classes, takes

__all__ = ["flag_problems", "method_problems"]

#: methods that always return something; None from the others has a meaning
_RETURN = (
    "token_weights", "observe", "auxiliary_losses", "token_details", "metrics", "modules", "stages", "learning_rates",
    "check_data", "state_dict",
)  # fmt: skip
_FLAGS = {"token_loss": "needs_token_loss", "entropy": "needs_entropy"}
#: methods that are given a view with those
_OF_VIEW = ("token_weights", "eligible", "auxiliary_losses", "token_details")
#: a trainer without any of them is a baseline; other trainers may have whatever they need beside them
_LEARNS = frozenset({"token_weights", "auxiliary_losses"})
_SCHEDULES = frozenset({"stages", "groups", "observe"})


def flag_problems(cls: type, instance: object | None = None) -> Iterator[str]:
    """Find an ``entropy_top_k`` that is no number of tokens.

    Arguments: see `method_problems`.
    """
    value = inspect.getattr_static(cls if instance is None else instance, "entropy_top_k")
    is_known = value is None or not hasattr(type(value), "__get__")
    if is_known and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        yield f"entropy_top_k is {value!r:.60}; write a whole number of tokens, 1 or more, or None"


def method_problems(cls: Any, instance: object | None = None) -> Iterator[str]:
    """Find methods without ``return``, and reads of values not asked for.

    Args:
        cls: a trainer's class.
        instance: what ``build()`` made; None: only the class is known.

    Returns:
        one line each: class, method, what to write.
    """
    classes, own = own_classes(cls), vars(instance) if hasattr(instance, "__dict__") else {}
    resolved = {name: (o, vars(o)[name]) for o in reversed(cls.__mro__) for name in vars(o)}
    given = {name: resolved[name] for name in cls._contract_methods if resolved[name][0] in classes and name not in own}
    judged = {
        name: (owner, member.__func__ if isinstance(member, staticmethod | classmethod) else member)
        for name, (owner, member) in given.items()
        if not getattr(member, "__isabstractmethod__", False)
    }
    for name, (owner, function) in judged.items():
        where = f"{owner.__name__}.{name}"
        if not isinstance(function, FunctionType):
            continue
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            yield f"{where} is async, which the loop does not await; write def without async"
        elif inspect.isgeneratorfunction(function):
            yield f"{where} has a yield, so a call does not run it; write return"
        elif name in _RETURN and _returns_nothing(function):
            hint = "; for uniform weights write: return view.uniform()" if name == "token_weights" else ""
            yield f"{where} returns nothing; write return before its result{hint}"
    members = [member for owner in classes for member in vars(owner).values()]
    for read, flag in _FLAGS.items():
        if flag in own or any(flag in vars(owner) for owner in classes) or _names(members, flag):
            continue  # a property, or set by __init__: checked when the view is read
        for name in _OF_VIEW:
            owner, function = judged.get(name, (cls, None))
            first = 0 if isinstance(resolved[name][1], staticmethod) else 1
            if callable(function) and _reads(inspect.unwrap(function), read, first):
                yield f"{owner.__name__}.{name} reads view.{read}, which is not computed; write {flag} = True in {cls.__name__}"
    yield from _unused_weights(cls, given.keys() | (own.keys() & cls._contract_methods))


def _unused_weights(cls: Any, given: set[str]) -> Iterator[str]:
    """Find a weighting that nothing calls, of a trainer without ``token_weights``.

    That is a method that takes a view.
    """
    if given & _LEARNS:
        return
    classes = own_classes(cls)
    unused = []
    for name, member in {name: member for owner in reversed(classes) for name, member in vars(owner).items()}.items():
        if name.startswith("__") or name in cls._contract_methods or not is_function(member) or not takes(member, 1):
            continue
        used = loaded_names(other for owner in classes for key, other in vars(owner).items() if key != name)
        is_weighing = isinstance(member, FunctionType) and name not in used and not given & _SCHEDULES
        if is_weighing or nearest_name(name.strip("_"), _LEARNS):
            unused.append(name)
    if unused:
        yield (
            f"{cls.__name__} has {', '.join(f'{name}()' for name in unused)}, and neither token_weights nor auxiliary_losses, "
            "which the loop calls; to weight tokens, write token_weights(self, view)"
        )


def _names(members: list[object], flag: str) -> bool:
    """Tell whether a function of the class sets or reads a flag."""
    return flag in loaded_names(members) or any(
        flag in function.__code__.co_names for member in members if isinstance(function := _plain(member), FunctionType)
    )


def _plain(member: object) -> object:
    return inspect.unwrap(member) if callable(member) else member


def _returns_nothing(function: FunctionType) -> bool:
    """Tell whether every way out of a function returns None."""
    return _code_returns_nothing(function.__code__)


@cache
def _code_returns_nothing(code: CodeType) -> bool:
    before, found = None, False
    for instruction in dis.get_instructions(code):
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return False
        if instruction.opname == "RETURN_VALUE" and not (before and before.opname == "LOAD_CONST" and before.argval is None):
            return False
        found = found or instruction.opname.startswith("RETURN_")
        before = instruction
    return found


def _reads(function: object, name: str, place: int) -> bool:
    """Tell whether a function reads attribute ``name`` of parameter ``place``."""
    if not isinstance(function, FunctionType) or function.__code__.co_argcount <= place:
        return False
    return _code_reads(function.__code__, name, function.__code__.co_varnames[place])


@cache
def _code_reads(code: CodeType, name: str, view: str) -> bool:
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_ATTR" and instruction.argval == name and before is not None:
            loaded = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
            if before.opname.startswith("LOAD_FAST") and loaded == view:
                return True
        before = instruction
    return False
