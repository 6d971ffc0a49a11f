"""Damage of files for tests of those who read them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from wmtp.cli import main

__all__ = ["of_bytes", "of_tensors", "of_values", "said_by"]

_STRANGE = (None, "x", [], {}, -1, 10**400, [[1]], {"a": 1}, True, 1.5, 10**18)


def of_bytes(rng: random.Random, text: bytes) -> Iterator[tuple[str, bytes]]:
    """Damage that a disk, a copy or another program does to any file."""
    flipped = bytearray(text)
    flipped[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    yield "empty", b""
    yield "cut", text[: rng.randrange(1, len(text))]
    yield "deep list", b"[" * 200_000
    yield "deep object", b'{"a":' * 100_000
    yield "UTF-16", b"\xff\xfe" + text
    yield "null", b"null\n"
    yield "list", b"[1, 2]\n"
    yield "number", b"1e999\n"
    yield "bit", bytes(flipped)
    yield "zeros", bytes(len(text))


def of_values(rng: random.Random, text: bytes) -> Iterator[tuple[str, bytes]]:
    """Valid JSON in which one value is of another type, or missing."""
    records = [json.loads(line) for line in text.splitlines()] if b"\n{" in text else [json.loads(text)]
    holders: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            holders.append((value, key))
            walk(value[key])

    for record in records:
        walk(record)
    outer = [holder for holder in holders if any(holder[0] is record for record in records)]
    holder, key = rng.choice(outer if rng.random() < 0.5 else holders)
    if isinstance(holder, dict) and rng.random() < 0.3:
        del holder[key]
        yield f"without {key}", "".join(json.dumps(record) + "\n" for record in records).encode()
    else:
        holder[key] = rng.choice(_STRANGE)
        yield f"{key} = {holder[key]!r:.20}", "".join(json.dumps(record) + "\n" for record in records).encode()


def of_tensors(rng: random.Random, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Change the header of a safetensors file, or all of its numbers."""
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])

    def made(**changes: Any) -> bytes:
        text = json.dumps({key: value for key, value in (header | changes).items() if value is not None}).encode()
        return len(text).to_bytes(8, "little") + text + rest

    yield "another type", made(**{name: {**header[name], "dtype": "I64"}})
    yield "another shape", made(**{name: {**header[name], "shape": [1]}})
    yield "far offsets", made(**{name: {**header[name], "data_offsets": [0, 10**12]}})
    yield "without one", made(**{name: None})
    yield "one more", made(other=header[name])
    yield "format", made(__metadata__={"format": 3})
    yield "endless header", (2**62).to_bytes(8, "little") + content[8:]
    yield "not finite", content[: 8 + length] + b"\xff" * len(rest)


def said_by(words: list[str]) -> tuple[int, str]:
    """Run a command; return its exit code, and what it wrote to standard error."""
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        code = main(words)
    return code, said.getvalue()
