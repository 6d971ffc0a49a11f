"""Plain text: a document a file, or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.files import given_path, open_binary, readable, uncompressed_name
from wmtp.errors import WMTPError

__all__ = ["TextLoader"]


#: of ``pattern``
DEFAULT_PATTERN = "*.txt"


class TextLoader(ExampleLoader):
    """Reads text files; see `wmtp.data.config.TextFiles`.

    Args:
        pattern: names of the files that count in a folder.
        document_separator: what stands between two documents of a file; None: a file is one document.
    """

    def __init__(self, pattern: str, document_separator: str | None) -> None:
        self._pattern = pattern
        self._separator = document_separator

    def files(self, path: Path | None) -> Sequence[Path]:
        """List the file ``path``, or the matching visible files below it, sorted.

        Raises:
            WMTPError: there is none.
        """
        path = given_path(path)
        if path.is_file():
            if self._pattern != DEFAULT_PATTERN and not fnmatchcase(uncompressed_name(path), self._pattern):
                raise WMTPError(f"{path}: is one file, which pattern = {self._pattern!r} does not match; remove pattern")
            return [path]
        if not path.is_dir():
            raise WMTPError(f"{path}: no such file or folder")
        found = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
        chosen = {
            relative.as_posix(): file
            for relative, file in found.items()
            if fnmatchcase(uncompressed_name(file), self._pattern) and not any(part.startswith(".") for part in relative.parts)
        }
        if not chosen:
            raise WMTPError(f"{path}: holds no file named {self._pattern}; set pattern to the names of your text files")
        return [chosen[name] for name in sorted(chosen)]

    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield the documents in the order of the files' names, without blank ones."""
        root = given_path(path)
        for file in self.files(root):
            name = file.name if file == root else file.relative_to(root).as_posix()
            with readable(file), open_binary(file) as stream:
                content = stream.read()
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
