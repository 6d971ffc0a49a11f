"""Writes tokenized documents to disk, for `wmtp.data.store`."""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from attrs import asdict

from wmtp.data.base import Example
from wmtp.data.notes import Note
from wmtp.data.store import STORE_INFO, UNKNOWN, StoreInfo
from wmtp.data.tokenized import TokenizedExample

__all__ = ["StoreWriter"]

_FLUSH_ITEMS: Final = 1 << 20
_FLUSH_ROWS: Final = 1 << 12
_DOCUMENT_COLUMNS: Final = {
    "ends": "q",
    "prompt_lengths": "q",
    "is_correct": "b",
    "reward": "d",
    "group_hashes": "Q",
    "name_ends": "q",
}
_SEGMENT_COLUMNS: Final = {"segment_ends": "q", "segment_kinds": "b", "segment_scales": "f"}
_json_text: Final = json.encoder.encode_basestring_ascii


class _Column:
    """A file of numbers that is written piece by piece.

    Args:
        path: the file.
        typecode: of the numbers.
        size: bytes that are there already; the file is cut to them.
    """

    def __init__(self, path: Path, typecode: str, size: int = 0) -> None:
        self._file = path.open("r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)
        self._buffer = array(typecode)

    def extend(self, values: Sequence[Any]) -> None:
        self._buffer.extend(values)
        if len(self._buffer) > _FLUSH_ITEMS:
            self.flush()

    def extend_bytes(self, content: bytes) -> None:
        self._buffer.frombytes(content)
        if len(self._buffer) > _FLUSH_ITEMS:
            self.flush()

    def repeat(self, value: float, count: int) -> None:
        for begin in range(0, count, _FLUSH_ITEMS):
            self.extend([value] * min(_FLUSH_ITEMS, count - begin))

    def flush(self) -> None:
        self._buffer.tofile(self._file)
        del self._buffer[:]

    def saved(self) -> int:
        """Write everything to the disk, and return the size of the file."""
        self.flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self.flush()
        self._file.close()


class _Tokens(_Column):
    """Column of tokens, which come in four bytes each.

    Args:
        path: the file.
        dtype: of the tokens in it.
        size: see `_Column`.
    """

    def __init__(self, path: Path, dtype: str, size: int = 0) -> None:
        super().__init__(path, "I", size)
        self._dtype = dtype

    def flush(self) -> None:
        np.frombuffer(self._buffer, np.uint32).astype(self._dtype, copy=False).tofile(self._file)
        self._buffer = array("I")


class _Table:
    """Columns that are written together, row by row.

    One call a row is faster than one a value.

    Args:
        columns: by name, in the order of a row's values.
    """

    def __init__(self, columns: Mapping[str, _Column]) -> None:
        self.columns = columns
        self.rows: list[tuple[float, ...]] = []

    def flush(self) -> None:
        """Hand the rows to the columns."""
        for column, values in zip(self.columns.values(), zip(*self.rows, strict=True), strict=False):
            column.extend(values)
        self.rows.clear()


class StoreWriter:
    """Writes a store into a folder.

    Nothing counts until `close` has written ``store.json``.

    Args:
        folder: exists, empty, or as it was after `saved`.
        vocab_size: decides whether a token takes two bytes or four.
        saved: what `saved` returned; what was written after that is dropped.
    """

    def __init__(self, folder: Path, vocab_size: int, saved: Mapping[str, Any] | None = None) -> None:
        state = saved or {"sizes": {}, "count": 0, "end": 0, "name_end": 0, "has_scales": False, "conversations": 0}
        self._folder = folder
        self._sizes: Mapping[str, int] = state["sizes"]
        self._token_type = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._tokens = _Tokens(folder / "tokens.bin", self._token_type, self._sizes.get("tokens", 0))
        self._documents = _Table({name: self._column(name, typecode) for name, typecode in _DOCUMENT_COLUMNS.items()})
        self._segments = _Table({name: self._column(name, typecode) for name, typecode in _SEGMENT_COLUMNS.items()})
        self._names = self._column("names", "B")
        self._weights = self._column("weights", "f") if "weights" in self._sizes else None
        self._count: int = state["count"]
        self._end: int = state["end"]
        self._name_end: int = state["name_end"]
        self._has_scales: bool = state["has_scales"]
        self._conversations: int = state["conversations"]

    def _column(self, name: str, typecode: str) -> _Column:
        return _Column(self._folder / f"{name}.bin", typecode, self._sizes.get(name, 0))

    @property
    def documents(self) -> int:
        """Documents so far."""
        return self._count

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._end

    def add(self, example: Example, document: TokenizedExample) -> None:
        """Append a document.

        Args:
            example: where it is from.
            document: its tokens.
        """
        tokens, weights = document.tokens, document.weights
        segments, documents, segment_end = self._segments.rows, self._documents.rows, self._end
        for segment in document.segments:
            segment_end += segment.length
            segments.append((segment_end, segment.kind, segment.scale))
            if segment.scale != 1.0:
                self._has_scales = True
        if len(segments) >= _FLUSH_ROWS:
            self._segments.flush()
        self._conversations += document.conversation
        if weights is not None and self._weights is None:
            self._weights = self._column("weights", "f")
            self._weights.repeat(1.0, self._end)
        if self._weights is not None:
            self._weights.extend([1.0] * len(tokens) if weights is None else weights)
        self._tokens.extend(tokens)
        self._end += len(tokens)
        group = example.group or example.id
        place = example.where.rpartition("/")[2]
        own = "" if place in ("", example.id) else f", {_json_text(place)}"
        name = f"[{_json_text(example.id)}, {_json_text(group)}{own}]".encode()
        self._names.extend_bytes(name)
        self._name_end += len(name)
        documents.append(
            (
                self._end,
                document.prompt_length,
                UNKNOWN if example.is_correct is None else int(example.is_correct),
                math.nan if example.reward is None else example.reward,
                int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest()),
                self._name_end,
            )
        )
        if len(documents) >= _FLUSH_ROWS:
            self._documents.flush()
        self._count += 1

    def _columns(self) -> dict[str, _Column]:
        """List the columns by name, with all rows so far in them."""
        found = {"tokens": self._tokens, "names": self._names}
        for table in (self._documents, self._segments):
            table.flush()
            found |= table.columns
        return found if self._weights is None else found | {"weights": self._weights}

    def saved(self) -> dict[str, Any]:
        """Write everything so far to disk; return the state to resume from."""
        return {
            "sizes": {name: column.saved() for name, column in self._columns().items()},
            "count": self._count,
            "end": self._end,
            "name_end": self._name_end,
            "has_scales": self._has_scales,
            "conversations": self._conversations,
        }

    def close(self, bad: Sequence[str], bad_count: int, notes: Sequence[Note] = ()) -> None:
        """Finish the store.

        Args:
            bad: messages on the first examples that could not be read.
            bad_count: how many there were.
            notes: what is to be said of the data whenever it is read.
        """
        for column in self._columns().values():
            column.close()
        files = sorted(self._folder.glob("*.bin"))
        info = StoreInfo(
            documents=self._count,
            tokens=self._end,
            bad=bad_count,
            bad_messages=tuple(bad),
            token_type=self._token_type,
            has_weights=self._weights is not None,
            has_scales=self._has_scales,
            conversations=self._conversations,
            notes=tuple(notes),
            sizes={file.name: file.stat().st_size for file in files},
            digest=_digest(files),
        )
        (self._folder / STORE_INFO).write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
