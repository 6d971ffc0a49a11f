"""Plain text: a document a file, or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.compression import read_whole, readable, uncompressed_name
from wmtp.data.files import LFS_HINT, LFS_POINTER, given_path
from wmtp.data.splits import Named, chosen, format_of, named
from wmtp.errors import InputError
from wmtp.storage.walk import files_below, is_hidden, not_there, require_target

__all__ = ["DEFAULT_PATTERN", "TextLoader"]

DEFAULT_PATTERN: Final = "*.txt"
#: bytes of a file that is read for a look at its beginning
_QUICK: Final = 32_000_000


class TextLoader(ExampleLoader):
    """Reads text files; see `wmtp.data.config.TextFiles`.

    Args:
        pattern: names of the files that count in a folder.
        document_separator: what stands between two documents of a file; None: a file is one document.
        split: which files of a folder are read; None: their names must leave no choice.
    """

    def __init__(self, pattern: str, document_separator: str | None, split: str | None = None) -> None:
        self._pattern = pattern
        self._separator = None if document_separator is None else document_separator.replace("\r\n", "\n")  # as in the texts
        self._split = split

    def files(self, path: Path | None) -> Sequence[Path]:
        """List the file ``path``, or the matching visible files below it, sorted.

        Raises:
            InputError: there is none, or none of the split.
        """
        path = given_path(path)
        if path.is_file():
            matches = fnmatchcase(uncompressed_name(path), self._pattern)
            if self._pattern != DEFAULT_PATTERN and not matches:
                raise InputError("pattern", f"{path}: is one file, which pattern = {self._pattern!r} does not match; remove it")
            if format_of(path) is not None and not matches:
                raise InputError(
                    "type",
                    f"'text' would read {path} as one text, quotes and keys included; write type = 'jsonl' or 'chat' for its "
                    f"records, or pattern = '*{format_of(path)}' if that is meant",
                )
            return chosen(path, [self._named(path, path.parent)], self._split)
        if not path.is_dir():
            raise InputError("uri", not_there(path))
        found = {file.relative_to(path): file for file in files_below(path)}
        matching = {
            relative.as_posix(): file
            for relative, file in found.items()
            if fnmatchcase(uncompressed_name(file), self._pattern) and not is_hidden(relative)
        }
        if not matching:
            raise InputError("uri", f"{path}: holds no file named {self._pattern}; set pattern to the names of your text files")
        files = chosen(path, [self._named(matching[name], path) for name in sorted(matching)], self._split)
        for file in files:
            require_target(file)
        return files

    def first_examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Read the first documents, unless their file is large."""
        return self.examples(path) if self.files(path)[0].stat().st_size <= _QUICK else iter(())

    def _named(self, file: Path, root: Path) -> Named:
        """Read the split in the name of a file or its folder.

        One word among others does not count: titles have words like these too.
        """
        folders = [part for part in file.relative_to(root).parts[:-1] if part != "data"]
        found = named(file, Path(folders[0]), words=False) if folders else None
        return found if found is not None and found.split is not None else named(file, words=False)

    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield the documents in the order of the files' names.

        Blank parts between separators are left out.
        """
        root = given_path(path)
        for file in self.files(root):
            name = file.name if file == root else file.relative_to(root).as_posix()
            with readable(file):
                content = read_whole(file, instead="divide it into several files")
            if content.startswith(LFS_POINTER):
                yield BadExample(str(file), LFS_HINT)
                continue
            try:
                text = content.decode("utf-8-sig").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                yield BadExample(f"{file}:{line}", f"not valid UTF-8 (byte {error.start + 1} of the file)")
                continue
            if self._separator is None:
                yield Example(id=name, completion=text, where=str(file))
                continue
            line = 1
            for part in text.split(self._separator):
                if part.strip():
                    place = line + part[: len(part) - len(part.lstrip())].count("\n")
                    yield Example(id=f"{name}:{place}", completion=part, where=f"{file}:{place}")
                line += part.count("\n") + self._separator.count("\n")
