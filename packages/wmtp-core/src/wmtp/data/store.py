"""Tokenized documents on disk, read through memory maps.

A store is a folder of plain arrays and ``store.json``, which is written last and records the size of every file. It keeps
whole documents, and of each the segments that are learned alike. How long a row may be, and whether prompts are learned, is
decided when it is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from attrs import field, frozen
from attrs.validators import in_, instance_of
from numpy.typing import NDArray

from wmtp.data.base import Document
from wmtp.data.notes import Note
from wmtp.errors import FileError, WMTPError
from wmtp.json_files import DAMAGE, read_json_object, reading

__all__ = ["STORE_INFO", "UNKNOWN", "StoreInfo", "TokenStore"]

#: file of a store that is whole
STORE_INFO: Final = "store.json"
#: label of a document that has none
UNKNOWN: Final = -1


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

    documents: int = field(validator=instance_of(int))
    tokens: int = field(validator=instance_of(int))
    bad: int = field(validator=instance_of(int))
    bad_messages: tuple[str, ...]
    token_type: str = field(validator=in_(("uint16", "uint32")))
    has_weights: bool = field(validator=instance_of(bool))
    has_scales: bool = field(validator=instance_of(bool))
    conversations: int = field(validator=instance_of(int))
    notes: tuple[Note, ...] = field(converter=lambda notes: tuple(n if isinstance(n, Note) else Note(**n) for n in notes))
    sizes: dict[str, int]
    digest: str


class TokenStore:
    """A store that was written whole.

    Args:
        folder: what `wmtp.data.store_writer.StoreWriter` wrote.
        key: the hash of all that decided its content.

    Raises:
        WMTPError: it is not whole.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.key = key
        self.info = _read_info(folder)
        with reading(folder / STORE_INFO, "delete the folder"):  # it may tell of columns that are not there
            self._open(folder)

    def _open(self, folder: Path) -> None:
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
        """Open the store; None where there is no complete one."""
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
            is_correct=None if is_correct == UNKNOWN else bool(is_correct),
            reward=None if np.isnan(reward) else reward,
        )

    def place(self, number: int) -> str:
        """Name the file and line of a document, or its substitute."""
        example_id, _, *place = self._names_of(number)
        return f"{place[0]}, {example_id!r:.80}" if place else example_id

    def _names_of(self, number: int) -> list[str]:
        start = int(self._name_ends[number - 1]) if number else 0
        return json.loads(self._names[start : int(self._name_ends[number])].tobytes())


def _read_info(folder: Path) -> StoreInfo:
    try:
        info = StoreInfo(**read_json_object(folder / STORE_INFO))
        broken = [name for name, size in info.sizes.items() if (folder / name).stat().st_size != size]
    except (OSError, FileError, *DAMAGE) as error:
        raise FileError(f"{folder}: not a whole token store ({error}); delete the folder") from error
    if broken:
        raise FileError(f"{folder / broken[0]}: damaged, it has another size than when it was written; delete the folder")
    return info


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
