"""Base of the loaders that read records of data files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.compression import is_compressed
from wmtp.data.files import Record, given_path, in_columns, parsed, read_records
from wmtp.data.splits import data_files, format_of, missing_shards, unread_files
from wmtp.errors import InputError
from wmtp.spelling import nearest

__all__ = ["RecordLoader"]

#: of a file that must be read whole before its first record is known
_QUICK: Final = 32_000_000
_FIRST: Final = 32
#: weight and weights, but not idx and id, or context and text
_ALIKE: Final = 0.85


class RecordLoader(ExampleLoader, contract=True):
    """Reads data files record by record.

    A subclass says what a record becomes.

    Args:
        split: which files of a folder are read; None: their names must leave no choice.
    """

    #: the split that is read where the names leave a choice, and the config makes none
    _preferred: str | None = None

    def __init__(self, split: str | None = None) -> None:
        self._split = split

    def files(self, path: Path | None) -> Sequence[Path]:
        """Find the data files of the split at ``path``."""
        return data_files(given_path(path), self._split, preferred=self._preferred)

    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Read the records in the order of the files."""
        files = self.files(path)
        yield from parsed(read_records(files), partial(self._record, columns=in_columns(files[0])))

    def first_examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield the first examples, unless the file is too large."""
        files = self.files(path)
        records = _first_records(files)
        if records is None:
            return
        if not records:
            raise InputError("uri", f"{path}: holds no record")
        yield from parsed(records, partial(self._record, columns=in_columns(files[0])))

    def doubts(self, path: Path | None) -> Sequence[str]:
        """Report missing shards, and likely data that is not read."""
        files = self.files(path)
        return [*missing_shards(files), *unread_files(given_path(path), files)]

    def unread_keys(self, path: Path | None) -> Mapping[str, str | None]:
        """List unread keys of the first records.

        Empty where the file is too large, see `_first_records`.
        """
        found: dict[str, str | None] = {}
        for record in _first_records(self.files(path)) or ():
            if isinstance(record, BadExample) or (known := self._keys_read(record[1])) is None:
                continue
            for key in record[1]:
                if key not in known and key not in found:
                    found[key] = nearest(key, known - record[1].keys(), cutoff=_ALIKE)
        return found

    def _keys_read(self, record: Mapping[str, Any]) -> Set[str] | None:
        """Name the keys that are read of a record; None: unknown."""
        return None

    @abstractmethod
    def _record(self, where: str, record: Mapping[str, Any], *, columns: bool) -> Iterator[Example]:
        """Make the examples of a record.

        Args:
            where: its place.
            record: what stands there.
            columns: see `in_columns`.

        Raises:
            BadExample: it is none.
        """


def _first_records(files: Sequence[Path]) -> list[Record | BadExample] | None:
    """Read the first records; None if the file is too large.

    Some formats must be read whole.
    """
    whole = format_of(files[0]) == ".json" or (is_compressed(files[0]) and in_columns(files[0]))
    if whole and files[0].stat().st_size > _QUICK:
        return None
    return list(islice(read_records(files), _FIRST))
