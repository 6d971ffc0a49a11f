"""First program of a sandbox: isolates itself, then runs the code.

Started as ``python -I -S -B child.py``. It uses the standard library and the files beside it, and nothing else of wmtp. By the
order of `main`: own namespaces, a root folder with nothing in it but Python and an empty working folder, an unprivileged user
without any capability, a filter of system calls, limits; only then the first line of code that is not ours.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmtp.sandbox.isolation import isolate, set_limits
    from wmtp.sandbox.plain_data import Known, contents, decode, encode, fill
else:  # as a program, this knows the files beside it and no wmtp
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from isolation import isolate, set_limits
    from plain_data import Known, contents, decode, encode, fill

    del sys.path[0]


def _renumbered(value: Any, numbers: list[Any]) -> Any:
    """Replace object numbers in a message by those of the other side."""
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
        """Read one message.

        EOFError where the other side has gone, or sends more than is allowed.
        """
        line = self._in.readline(self._most)
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


def serve(request: dict[str, Any], code: str) -> None:
    """Run the untrusted side: execute the code, answer calls of its names."""
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
        if "ref" not in call and call["name"] not in names:
            pipes.send({"missing": call["name"]})
            continue
        known = Known()
        try:
            function = refs[call["ref"]] if "ref" in call else names[call["name"]]
            arguments = [decode(value, refs.__getitem__, known) for value in call["args"]]
            keywords = {name: decode(value, refs.__getitem__, known) for name, value in call["kwargs"].items()}
            before, given = _all_contents(known, refs), len(known.all)
            try:
                answer = {"value": encode(function(*arguments, **keywords), refs, known)}
            except BaseException as error:
                answer = {"error": _builtin_kind(error), "text": str(error)[:500], "args": encode(error.args, refs, known)}
            # what it changed in its arguments, as the tests would see it if they ran in this process
            now = [(number, contents(known.all[number], refs, known)) for number in range(given)]
            answer["changed"] = [(number, content) for number, content in now if content != before[number]]
        except BaseException as error:
            answer = {"error": _builtin_kind(error), "text": str(error)[:500]}
        pipes.send(answer)


def _all_contents(known: Known, refs: list[Any]) -> list[Any]:
    return [contents(container, refs, known) for container in tuple(known.all)]


def _builtin_kind(error: BaseException) -> str:
    """Name the built-in class of an exception.

    A test catches one by its class, never by a name alone.
    """
    return next(kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind)


def judge(request: dict[str, Any], code: str) -> None:
    """Run the trusted side: tests that call into the other sandbox.

    The solution's names are such calls.
    """
    pipes = _Pipes(request["pipes"][0], request["pipes"][1], request["message"])

    broken: list[str] = []  # why the solution gives no more answers: whatever the tests make of that, it has not passed them

    def answered(call: dict[str, Any]) -> dict[str, Any]:
        if not broken:
            try:
                pipes.send(call)
                answer = pipes.receive()
                if "missing" not in answer:
                    return answer
                broken.append(f"NameError: name {str(answer['missing'])!r} is not defined")
            except (OSError, EOFError, ValueError, TypeError, RecursionError):
                broken.append("the solution ended by itself")
        raise SystemExit

    class Remote:
        def __init__(self, **target: Any) -> None:
            self._target = target

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            known = Known()
            sent = [_out(value, known) for value in args]
            answer = answered({**self._target, "args": sent, "kwargs": {name: _out(kwargs[name], known) for name in kwargs}})
            value: Any = None
            try:
                given = len(known.all)
                value = _exception(answer, known) if "error" in answer else decode(answer["value"], _remote, known)
                for number, content in answer.get("changed", ()):
                    fill(known.all[:given][number], content, _remote, known)
            except BaseException as error:
                broken.append(f"its answer is none: {type(error).__name__}")
                raise SystemExit from None
            if "error" in answer:
                raise value
            return value

        def _refuse(self, *_: Any) -> Any:
            raise TypeError("the solution's answer is no plain data: it can be called and handed back, and nothing else")

        # by default every object is true, and unequal to all others: both would pass tests that the object itself fails
        __bool__ = __eq__ = __ne__ = __hash__ = _refuse

    def _remote(number: int) -> Remote:
        return Remote(ref=int(number))

    def _exception(answer: dict[str, Any], known: Known) -> BaseException:
        kind = getattr(builtins, str(answer["error"]), None)
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise TypeError
        text = str(answer.get("text", ""))
        try:
            return kind(*decode(answer["args"], _remote, known)) if "args" in answer else kind(text)
        except TypeError:  # it is made of more than its arguments
            return Exception(text)

    class References(list[Any]):
        def append(self, value: Any) -> None:
            if not isinstance(value, Remote):
                raise TypeError(f"a test passes a {type(value).__name__}, which cannot be sent to the solution")
            super().append(value)

    def _out(value: Any, known: Known) -> Any:
        refs = References()
        return _renumbered(encode(value, refs, known), [remote._target.get("ref") for remote in refs])

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
    if broken:
        result = f"failed: {broken[0]}"
    verdict.write(json.dumps(result[:500]) + "\n")
    verdict.flush()


def main() -> None:
    """Read the request from a pipe, isolate this process, and run it.

    The program's argument is the pipe's number.
    """
    lifeline = int(sys.argv[1])
    with os.fdopen(lifeline, "rb", closefd=False) as pipe:
        request = json.loads(pipe.readline())
    if "cgroup" in request:
        with open(request["cgroup"] + "/cgroup.procs", "w") as file:
            file.write("0")
    if request["isolate"]:
        isolate(request, lifeline)
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
