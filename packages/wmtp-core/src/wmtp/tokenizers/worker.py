"""Program of a process that encodes texts; `wmtp.tokenizers.processes` starts it.

It is run by its path, and imports nothing but the standard library and `tokenizers`, so that it starts at once. It reads one
JSON line with its settings, then requests, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from array import array
from typing import Any, Final

__all__ = ["ANSWER", "FIRST", "MARK", "NEXT", "OFFSETS", "REQUEST"]

#: what is asked for: the start of documents, what stands behind other text, and the start with the places of tokens
FIRST: Final = 0
NEXT: Final = 1
OFFSETS: Final = 2
#: kind, number of texts, bytes of them all; then the bytes of each text (uint32), and the texts
REQUEST: Final = struct.Struct("<BIQ")
#: `MARK`, numbers of texts and of all tokens; then that of each text (uint32), the tokens (uint32), and their starts and
#: stops (uint32)
ANSWER: Final = struct.Struct("<4sIQ")
#: tells an answer from what other code prints while this process starts, a sitecustomize say
MARK: Final = b"wmtp"
#: texts that are encoded at once: what the tokenizer holds of them meanwhile fits into a core's own cache
_AT_ONCE: Final = 64
#: words whose tokens the tokenizer keeps, some 15 MB; its own limit of 10,000 is met by the first megabytes of a corpus
_WORDS: Final = 1 << 16


def main() -> None:
    """Answer requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; who asked closes the pipe
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    source, target = sys.stdin.buffer, sys.stdout.buffer
    settings = json.loads(source.readline())
    sys.path[:] = settings["path"]
    from tokenizers import Tokenizer

    backends = [_remembering(Tokenizer.from_str(spec)) for spec in settings["specs"]]
    while head := source.read(REQUEST.size):
        kind, count, size = REQUEST.unpack(head)
        sizes = array("I", source.read(4 * count))
        texts = _texts(source.read(size), sizes)
        target.write(_answer(backends[-1 if kind == NEXT else 0], texts, offsets=kind == OFFSETS))
        target.flush()


def _texts(content: bytes, sizes: array[int]) -> list[str]:
    texts, begin = [], 0
    for size in sizes:
        texts.append(content[begin : begin + size].decode())
        begin += size
    return texts


def _remembering(backend: Any) -> Any:
    """Enlarge a tokenizer's cache of words.

    Not every model has such a cache, nor every version this method.
    """
    resize = getattr(backend.model, "_resize_cache", None)
    if resize is not None:
        resize(_WORDS)
    return backend


def _answer(backend: Any, texts: list[str], *, offsets: bool) -> bytes:
    counts, tokens, places = array("I"), array("I"), array("I")
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    for begin in range(0, len(texts), _AT_ONCE):
        for encoded in encode(texts[begin : begin + _AT_ONCE], add_special_tokens=False):
            ids = encoded.ids
            counts.append(len(ids))
            tokens.extend(ids)
            if offsets:
                for place in encoded.offsets:
                    places.extend(place)
    return b"".join([ANSWER.pack(MARK, len(counts), len(tokens)), counts, tokens, places])


if __name__ == "__main__":
    main()
