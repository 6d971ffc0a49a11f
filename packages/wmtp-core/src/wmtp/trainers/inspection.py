"""Reads the methods of a trainer's class for mistakes that would otherwise show late, or never. Imports no torch."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import FunctionType

__all__ = ["method_problems"]

#: methods that always return something; None from the others has a meaning
_RETURN = (
    "token_weights", "observe", "auxiliary_losses", "token_details", "metrics", "modules", "stages", "learning_rates",
    "check_data", "state_dict",
)  # fmt: skip
_FLAGS = {"token_loss": "needs_token_loss", "entropy": "needs_entropy"}


def method_problems(cls: type, base: type) -> Iterator[str]:
    """Find methods without ``return``, and what they read of a view without asking for it.

    Args:
        cls: a trainer's class.
        base: `wmtp.trainers.Trainer`.

    Returns:
        one line each: class, method, what to write.
    """
    plugin = [owner for owner in cls.__mro__ if owner not in base.__mro__]
    functions = {
        name: (owner, function)
        for owner in reversed(plugin)
        for name, member in vars(owner).items()
        if isinstance(function := inspect.unwrap(member) if callable(member) else member, FunctionType)
    }
    for name in _RETURN:
        if name in functions and _returns_nothing(functions[name][1]):
            hint = "; for uniform weights write: return view.uniform()" if name == "token_weights" else ""
            yield f"{functions[name][0].__name__}.{name} returns nothing; write return before its result{hint}"
    for read, flag in _FLAGS.items():
        names = {name for _, function in functions.values() for name in function.__code__.co_names}
        if flag in names or any(flag in vars(owner) for owner in plugin):
            continue  # it is a property, or __init__ sets it: what it is shows when the view is read
        for name, (owner, function) in functions.items():
            if hasattr(base, name) and _reads(function, read):
                yield f"{owner.__name__}.{name} reads view.{read}, which is not computed; write {flag} = True in {cls.__name__}"
    own = [name for name in functions if not name.startswith("_") and not hasattr(base, name)]
    if own and not any(hasattr(base, name) for name in functions if not name.startswith("_")):
        yield (
            f"{cls.__name__} has {', '.join(f'{name}()' for name in own)}, and none of the methods that the loop calls; to "
            "weigh tokens write token_weights(self, view)"
        )


def _returns_nothing(function: FunctionType) -> bool:
    """Tell whether every way out of a function returns None."""
    before, found = None, False
    for instruction in dis.get_instructions(function):
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return False
        if instruction.opname == "RETURN_VALUE" and not (before and before.opname == "LOAD_CONST" and before.argval is None):
            return False
        found = found or (instruction.opname.startswith("RETURN_") and instruction.opname != "RETURN_GENERATOR")
        before = instruction
    return found


def _reads(function: FunctionType, name: str) -> bool:
    """Tell whether a function reads the attribute ``name`` of its second parameter."""
    parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
    if len(parameters) < 2:
        return False
    before = None
    for instruction in dis.get_instructions(function):
        if instruction.opname == "LOAD_ATTR" and instruction.argval == name and before is not None:
            loaded = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
            if before.opname.startswith("LOAD_FAST") and loaded == parameters[1]:
                return True
        before = instruction
    return False
