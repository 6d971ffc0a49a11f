"""Tokenised documents on disk, read through memory maps.

A store is a folder of plain arrays and ``store.json``, which is written last and records the size of every file. It keeps
whole documents, and of each the segments that are learned alike. How long a row may be, and whether prompts are learned, is
decided when it is read.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from attrs import asdict, field, frozen
from numpy.typing import NDArray

from wmtp.data.base import BadExample, Document, Example
from wmtp.data.notes import Note
from wmtp.data.tokenized import TokenizedExample
from wmtp.errors import WMTPError

__all__ = ["StoreInfo", "StoreWriter", "TokenStore"]

_INFO: Final = "store.json"
_FLUSH_ITEMS: Final = 1 << 20
_UNKNOWN: Final = -1


@frozen(kw_only=True)
class StoreInfo:
    """Contents of ``store.json``.

    Args:
        documents: their number.
        tokens: their tokens, begin and end tokens included.
        bad: how many examples could not be read.
        bad_messages: the first of those, as messages.
        token_type: numpy's name for the type of a token.
        has_weights: whether any document has weights of its own.
        has_scales: whether any segment multiplies a trainer's weights.
        conversations: how many of the documents a chat template made.
        notes: remarks to show whenever the data is read.
        sizes: bytes of every other file.
        digest: a hash of their content.
    """

    documents: int
    tokens: int
    bad: int
    bad_messages: tuple[str, ...]
    token_type: str
    has_weights: bool
    has_scales: bool
    conversations: int
    notes: tuple[Note, ...] = field(converter=lambda notes: tuple(n if isinstance(n, Note) else Note(**n) for n in notes))
    sizes: dict[str, int]
    digest: str


class _Column:
    """A file of numbers that is written piece by piece."""

    def __init__(self, path: Path, typecode: str) -> None:
        self._file = path.open("wb")
        self._buffer = array(typecode)

    def extend(self, values: Sequence[Any]) -> None:
        self._buffer.extend(values)
        if len(self._buffer) > _FLUSH_ITEMS:
            self._flush()

    def _flush(self) -> None:
        self._buffer.tofile(self._file)
        del self._buffer[:]

    def close(self) -> None:
        self._flush()
        self._file.close()


class StoreWriter:
    """Writes a store into an empty folder. Nothing counts until `close` has written ``store.json``.

    Args:
        folder: exists, empty.
        vocab_size: decides whether a token takes two bytes or four.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._token_type = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._tokens = _Column(folder / "tokens.bin", "H" if self._token_type == "uint16" else "I")
        typecodes = {
            "ends": "q",
            "prompt_lengths": "q",
            "is_correct": "b",
            "reward": "d",
            "group_hashes": "Q",
            "name_ends": "q",
            "segment_ends": "q",
            "segment_kinds": "b",
            "segment_scales": "f",
        }
        self._columns = {name: _Column(folder / f"{name}.bin", typecode) for name, typecode in typecodes.items()}
        self._names = (folder / "names.bin").open("wb")
        self._weights: _Column | None = None
        self._count = 0
        self._end = 0
        self._name_end = 0
        self._has_scales = False
        self._conversations = 0

    def add(self, example: Example, document: TokenizedExample) -> None:
        """Append a document.

        Args:
            example: where it is from.
            document: its tokens.
        """
        tokens, weights = document.tokens, document.weights
        segment_end = self._end
        for segment in document.segments:
            segment_end += segment.length
            self._columns["segment_ends"].extend((segment_end,))
            self._columns["segment_kinds"].extend((segment.kind,))
            self._columns["segment_scales"].extend((segment.scale,))
            self._has_scales |= segment.scale != 1.0
        self._conversations += document.conversation
        if weights is not None and self._weights is None:
            self._weights = _Column(self._folder / "weights.bin", "f")
            self._weights.extend([1.0] * self._end)
        if self._weights is not None:
            self._weights.extend([1.0] * len(tokens) if weights is None else weights)
        self._tokens.extend(tokens)
        self._end += len(tokens)
        group = example.group or example.id
        place = Path(example.where).name
        name = json.dumps([example.id, group, *([place] if place not in ("", example.id) else [])]).encode()
        self._names.write(name)
        self._name_end += len(name)
        for column, value in (
            ("ends", self._end),
            ("prompt_lengths", document.prompt_length),
            ("is_correct", _UNKNOWN if example.is_correct is None else int(example.is_correct)),
            ("reward", float("nan") if example.reward is None else example.reward),
            ("group_hashes", int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest())),
            ("name_ends", self._name_end),
        ):
            self._columns[column].extend((value,))
        self._count += 1

    def close(self, bad: Sequence[BadExample], bad_count: int, notes: Sequence[Note] = ()) -> None:
        """Finish the store.

        Args:
            bad: the first examples that could not be read.
            bad_count: how many there were.
            notes: what is to be said of the data whenever it is read.
        """
        for column in (self._tokens, *self._columns.values()):
            column.close()
        self._names.close()
        if self._weights is not None:
            self._weights.close()
        files = sorted(self._folder.iterdir())
        info = StoreInfo(
            documents=self._count,
            tokens=self._end,
            bad=bad_count,
            bad_messages=tuple(str(problem) for problem in bad),
            token_type=self._token_type,
            has_weights=self._weights is not None,
            has_scales=self._has_scales,
            conversations=self._conversations,
            notes=tuple(notes),
            sizes={file.name: file.stat().st_size for file in files},
            digest=_digest(files),
        )
        (self._folder / _INFO).write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")


class TokenStore:
    """A store that was written whole.

    Args:
        folder: what `StoreWriter` wrote.
        key: the hash of all that decided its content.

    Raises:
        WMTPError: it is not whole.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.key = key
        self.info = _read_info(folder)
        self.tokens = _mapped(folder / "tokens.bin", self.info.token_type)
        self.weights = _mapped(folder / "weights.bin", "float32") if self.info.has_weights else None
        ends = _mapped(folder / "ends.bin", "int64")
        self.starts = np.concatenate([[0], ends]).astype(np.int64)
        self.prompt_lengths = _mapped(folder / "prompt_lengths.bin", "int64")
        self.group_hashes = _mapped(folder / "group_hashes.bin", "uint64")
        self.is_correct = _mapped(folder / "is_correct.bin", "int8")  # 1, 0, or -1 where it is not known
        self.reward = _mapped(folder / "reward.bin", "float64")  # NaN where it is not known
        self.segment_ends = _mapped(folder / "segment_ends.bin", "int64")
        self.segment_kinds = _mapped(folder / "segment_kinds.bin", "int8")
        self.segment_scales = _mapped(folder / "segment_scales.bin", "float32") if self.info.has_scales else None
        self._names = _mapped(folder / "names.bin", "uint8")
        self._name_ends = _mapped(folder / "name_ends.bin", "int64")

    @classmethod
    def open_if_whole(cls, folder: Path, key: str) -> Self | None:
        """Open the store; None where there is none, or it is not complete."""
        try:
            return cls(folder, key)
        except WMTPError:
            return None

    def __len__(self) -> int:
        return self.info.documents

    def document(self, number: int, index: int, start: int, source: str) -> Document:
        """Return identity and labels of a document.

        Args:
            number: its number in this store.
            index: its number in the data set.
            start: where the piece starts.
            source: the data set's name in the config.
        """
        example_id, group, *_ = self._names_of(number)
        is_correct, reward = int(self.is_correct[number]), float(self.reward[number])
        return Document(
            index=index,
            start=start,
            id=example_id,
            group=group,
            source=source,
            is_correct=None if is_correct == _UNKNOWN else bool(is_correct),
            reward=None if np.isnan(reward) else reward,
        )

    def place(self, number: int) -> str:
        """Name the file and line of a document, or its substitute."""
        example_id, _, *place = self._names_of(number)
        return f"{place[0]}, {example_id!r:.80}" if place else example_id

    def _names_of(self, number: int) -> list[str]:
        start = int(self._name_ends[number - 1]) if number else 0
        return json.loads(self._names[start : int(self._name_ends[number])].tobytes())


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_info(folder: Path) -> StoreInfo:
    try:
        info = StoreInfo(**json.loads((folder / _INFO).read_text(encoding="utf-8")))
        broken = [name for name, size in info.sizes.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, TypeError) as error:
        raise WMTPError(f"{folder}: not a whole token store ({error}); delete the folder") from error
    if broken:
        raise WMTPError(f"{folder / broken[0]}: damaged, it has another size than when it was written; delete the folder")
    return info


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
