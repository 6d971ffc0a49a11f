"""Processes that encode texts beside this one.

Threads do not do: what they encode becomes Python's objects one after another, since only one thread of a process runs Python.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from array import array
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, Final, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from wmtp.cores import usable_cores
from wmtp.tokenizers import worker
from wmtp.tokenizers.base import Tokenizer

__all__ = ["Encoder", "EncodingProcess", "Encodings"]

#: characters after which processes are worth their start of half a second
_WORTH: Final = 4_000_000
#: one that reads and writes keeps no more of them busy
_MOST: Final = 16
_log = logging.getLogger("wmtp")


class Encoder(Protocol):
    """Tokenizer, or a process of its own that does the same."""

    def encode_many(self, texts: Sequence[str], *, first: bool = False) -> Sequence[Sequence[int]]:
        """See `Tokenizer`."""
        ...

    def encode_many_with_offsets(
        self, texts: Sequence[str]
    ) -> Sequence[tuple[Sequence[int], Collection[Sequence[int]]] | None]:
        """See `Tokenizer`."""
        ...


class Encoding(Protocol):
    """Texts that an `Encoder` is to encode."""

    @property
    def characters(self) -> int:
        """Count their characters."""
        ...

    def encode(self, encoder: Encoder) -> None:
        """Encode them."""
        ...


class EncodingProcess:
    """A process that encodes as a tokenizer does.

    Args:
        settings: see `worker.main`, as one line of JSON.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, settings: bytes) -> None:
        command = [sys.executable, "-P", str(Path(worker.__file__))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=1 << 20
        )
        self._to, self._from = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        self._to.write(settings + b"\n")

    def encode_many(self, texts: Sequence[str], *, first: bool = False) -> list[array[int]]:
        """Encode as `Tokenizer.encode_many`.

        Raises:
            UnicodeEncodeError: a text is no Unicode.
            OSError: the process has ended.
            EOFError: it has, or its answer is none.
        """
        ends, tokens = self._request(worker.FIRST if first else worker.NEXT, texts)
        return [tokens[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def encode_many_with_offsets(self, texts: Sequence[str]) -> list[tuple[array[int], NDArray[np.uint32]]]:
        """Encode as `Tokenizer.encode_many_with_offsets`.

        Offsets are rows of start and stop.

        Raises:
            UnicodeEncodeError: a text is no Unicode.
            OSError: the process has ended.
            EOFError: it has, or its answer is none.
        """
        ends, tokens = self._request(worker.OFFSETS, texts)
        places = np.frombuffer(self._read(8 * len(tokens)), np.uint32).reshape(-1, 2)
        return [(tokens[begin:end], places[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    def _request(self, kind: int, texts: Sequence[str]) -> tuple[list[int], array[int]]:
        """Send texts, and read their tokens, and where those of each end."""
        contents = [text.encode() for text in texts]
        sizes = array("I", map(len, contents))
        self._to.write(worker.REQUEST.pack(kind, len(texts), sum(sizes)))
        self._to.write(sizes.tobytes())
        self._to.writelines(contents)
        self._to.flush()
        mark, answered, total = worker.ANSWER.unpack(self._read(worker.ANSWER.size))
        if mark != worker.MARK:
            raise EOFError("something else than tokens came from it")
        if answered != len(texts):  # reading on would wait for what never comes
            raise EOFError(f"it gave the tokens of {answered} texts for {len(texts)}")
        counts = np.frombuffer(self._read(4 * answered), np.uint32)
        return np.cumsum(counts, dtype=np.int64).tolist(), array("I", self._read(4 * total))

    def _read(self, size: int) -> bytes:
        content = self._from.read(size)
        if len(content) < size:
            raise EOFError(f"exit code {self._process.wait()}")
        return content

    def close(self) -> None:
        """End the process by closing its pipes.

        It reads the end of its requests, or cannot write its answer.
        """
        for stream in (self._to, self._from):
            with suppress(OSError):
                stream.close()
        self._process.wait()


class Encodings:
    """Encodes texts in turn, on all cores where they are many.

    Few are encoded in this process, many by processes of their own.

    Args:
        tokenizer: makes the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._here = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wmtp-tokens")
        self._pool: ThreadPoolExecutor | None = None
        # None: to be started; the tokenizer: in place of a process that has ended
        self._free: SimpleQueue[Encoder | None] = SimpleQueue()
        self._settings = b""
        self._characters = 0
        #: how many encodings should wait for their turn so that no core does
        self.ahead = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._here, self._pool):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        while not self._free.empty():
            if isinstance(process := self._free.get(), EncodingProcess):
                process.close()

    def submit(self, encoding: Encoding) -> Future[None]:
        """Have texts encoded."""
        before, self._characters = self._characters, self._characters + encoding.characters
        if before < _WORTH <= self._characters:
            self._start_processes()
        if self._pool is None:
            return self._here.submit(encoding.encode, self._tokenizer)
        return self._pool.submit(self._encode_by_process, encoding)

    def _start_processes(self) -> None:
        count = _processes()
        specs = self._tokenizer.backend_specs() if count > 1 and sys.executable else None
        if specs is None:
            return
        self._settings = json.dumps({"path": sys.path, "specs": specs}).encode()
        self._pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="wmtp-tokens")
        self.ahead = count + 1
        for _ in range(count):
            self._free.put(None)

    def _encode_by_process(self, encoding: Encoding) -> None:
        """Encode by a free process, which is started if needed."""
        process = self._free.get()
        try:
            if process is None:
                process = EncodingProcess(self._settings)
            encoding.encode(process)
        except (OSError, EOFError) as error:
            _log.warning("a process that tokenizes has ended (%s); this process continues without it", error)
            if isinstance(process, EncodingProcess):
                process.close()
            process = self._tokenizer
            encoding.encode(process)
        finally:
            self._free.put(process)


def _processes() -> int:
    """Count the processes to start, as the package tokenizers counts its threads."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("off", "false", "f", "no", "n", "0"):
        return 0
    cores = usable_cores()
    wanted = os.environ.get("RAYON_NUM_THREADS", "")
    return min(_MOST, int(wanted) if wanted.isdecimal() and int(wanted) else cores)
