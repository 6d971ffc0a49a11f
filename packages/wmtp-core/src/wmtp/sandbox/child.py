"""First program of a sandbox: isolates itself, then runs the code it is sent.

Started as ``python -I -S -B child.py``. It uses the standard library and `shut_in`, and nothing else of wmtp. By the order of
`main`: own namespaces, a root folder with nothing in it but Python and an empty working folder, an unprivileged user without
any capability, a filter of system calls, limits; only then the first line of code that is not ours.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmtp.sandbox.shut_in import set_limits, shut_in
else:  # as a program, this knows the files beside it and no wmtp
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from shut_in import set_limits, shut_in

    del sys.path[0]

_COLLECTIONS = ((list, "l"), (tuple, "t"), (set, "e"), (frozenset, "z"))


def encode(value: Any, refs: list[Any], depth: int = 0) -> Any:
    """Plain data as JSON can hold it. Anything else stays here, and only its number goes out."""
    if depth > 200:
        raise ValueError("too deep")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return {"i": hex(int(value))}
    if isinstance(value, float):
        return {"f": float.hex(float(value))}
    if isinstance(value, complex):
        return {"c": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, str):
        return {"s": str.__str__(value).encode("utf-8", "surrogatepass").hex()}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    for kind, name in _COLLECTIONS:
        iterate: Any = kind.__iter__  # not what a subclass makes of it
        if isinstance(value, kind):
            return {name: [encode(element, refs, depth + 1) for element in iterate(value)]}
    if isinstance(value, dict):
        return {"d": [[encode(k, refs, depth + 1), encode(v, refs, depth + 1)] for k, v in dict.items(value)]}
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return {"y": value.__name__}
    refs.append(value)
    return {"r": len(refs) - 1}


def decode(value: Any, refs: Callable[[int], Any]) -> Any:
    """Reverse `encode`; ``refs`` maps a number to its object."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "r":
        return refs(content)
    if kind == "y":
        found = vars(builtins)[content]
        if not isinstance(found, type):
            raise ValueError(content)
        return found
    if kind == "i":
        return int(content, 16)
    if kind == "f":
        return float.fromhex(content)
    if kind == "c":
        return complex(*map(float.fromhex, content))
    if kind == "s":
        return bytes.fromhex(content).decode("utf-8", "surrogatepass")
    if kind == "b":
        return bytes.fromhex(content)
    if kind == "d":
        return {decode(k, refs): decode(v, refs) for k, v in content}
    return {"l": list, "t": tuple, "e": set, "z": frozenset}[kind](decode(element, refs) for element in content)


def _renumbered(value: Any, numbers: list[Any]) -> Any:
    """Replace the object numbers in a message by those of the other side."""
    if isinstance(value, list):
        return [_renumbered(element, numbers) for element in value]
    if isinstance(value, dict):
        return (
            {"r": numbers[value["r"]]} if "r" in value else {kind: _renumbered(part, numbers) for kind, part in value.items()}
        )
    return value


class _Pipes:
    """Lines of JSON to and from the other side."""

    def __init__(self, reading: int, writing: int, most: int) -> None:
        self._in, self._out, self._most = os.fdopen(reading, "rb"), os.fdopen(writing, "wb"), most

    def send(self, message: dict[str, Any]) -> None:
        """Write one message."""
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()

    def receive(self) -> dict[str, Any]:
        """Read one message; EOFError where the other side has gone, or sends more than is allowed."""
        line = self._in.readline(self._most)
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


def serve(request: dict[str, Any], code: str) -> None:
    """Run the untrusted side: execute the code, and answer calls of its names."""
    pipes = _Pipes(request["pipes"][0], request["pipes"][1], request["message"])
    names: dict[str, Any] = {"__name__": "solution"}
    refs: list[Any] = []
    try:
        exec(compile(code, "solution", "exec"), names)
        pipes.send({"ready": True})
    except BaseException as error:
        pipes.send({"error": type(error).__name__, "text": str(error)[:500]})
        return
    while True:
        try:
            call = pipes.receive()
        except EOFError:
            return
        try:
            function = refs[call["ref"]] if "ref" in call else names[call["name"]]
            arguments = [decode(value, refs.__getitem__) for value in call["args"]]
            keywords = {name: decode(value, refs.__getitem__) for name, value in call["kwargs"].items()}
            answer = {"value": encode(function(*arguments, **keywords), refs)}
        except BaseException as error:
            answer = {"error": _builtin_kind(error), "text": str(error)[:500]}
        pipes.send(answer)


def _builtin_kind(error: BaseException) -> str:
    """Name of the built-in class that an exception is of: a test catches one by its class, never by a name alone."""
    return next(kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind)


def judge(request: dict[str, Any], code: str) -> None:
    """Run the trusted side: the tests, in which the solution's names call the other sandbox."""
    pipes = _Pipes(request["pipes"][0], request["pipes"][1], request["message"])

    class Remote:
        def __init__(self, **target: Any) -> None:
            self._target = target

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = {name: _out(value) for name, value in kwargs.items()}
            pipes.send({**self._target, "args": [_out(value) for value in args], "kwargs": out})
            answer = pipes.receive()
            if "error" in answer:
                kind = getattr(builtins, str(answer["error"]), None)
                usable = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, AssertionError)
                raise (kind if usable and kind else RuntimeError)(str(answer.get("text", "")))
            return decode(answer["value"], lambda number: Remote(ref=int(number)))

        def _refuse(self, *_: Any) -> Any:
            raise TypeError("the solution's answer is no plain data: it can be called and handed back, and nothing else")

        # by default every object is true, and unequal to all others: both would pass tests that the object itself fails
        __bool__ = __eq__ = __ne__ = __hash__ = _refuse

    class References(list[Any]):
        def append(self, value: Any) -> None:
            if not isinstance(value, Remote):
                raise TypeError(f"a test passes a {type(value).__name__}, which cannot be sent to the solution")
            super().append(value)

    def _out(value: Any) -> Any:
        refs = References()
        return _renumbered(encode(value, refs), [remote._target.get("ref") for remote in refs])

    verdict = os.fdopen(request["verdict"], "w")
    try:
        first = pipes.receive()
        if "error" in first:
            result = f"failed: {first['error']}: {first.get('text', '')}"
        else:
            names: dict[str, Any] = {"__name__": "tests"}
            exec(compile(request["setup"], "setup", "exec"), names)
            for name in request["names"]:
                names[name] = Remote(name=name)
            exec(compile(code, "tests", "exec"), names)
            result = "passed"
    except EOFError:
        result = "failed: the solution ended by itself"
    except BaseException as error:
        result = f"failed: {type(error).__name__}: {error}"
    verdict.write(json.dumps(result[:500]) + "\n")
    verdict.flush()


def main() -> None:
    """Read the request from the pipe whose number is the argument, shut in, and run."""
    lifeline = int(sys.argv[1])
    with os.fdopen(lifeline, "rb", closefd=False) as pipe:
        request = json.loads(pipe.readline())
    if request["isolate"]:
        shut_in(request, lifeline)
    else:
        os.close(lifeline)
    set_limits(request["limits"])
    sys.argv = ["solution"]
    code = request["code"]
    if request["mode"] == "serve":
        serve(request, code)
    elif request["mode"] == "judge":
        judge(request, code)
    else:  # a whole program, from standard input to standard output
        del request
        exec(compile(code, "solution", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
