"""Functions of real Python source: signature and docstring → body."""

from __future__ import annotations

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.compression import readable
from wmtp.errors import InputError, WMTPError
from wmtp.storage.walk import files_below, is_hidden, not_there, require_target

__all__ = ["PythonSourceLoader"]

_SKIPPED_FOLDERS: Final = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "node_modules"})


class PythonSourceLoader(ExampleLoader):
    """Reads functions and methods that have a docstring; see `wmtp.data.config.PythonSource`.

    Args:
        max_functions: number of first functions to take.
        min_length: leave out what is shorter, in characters of signature, docstring and body.
        max_length: leave out what is longer.
    """

    def __init__(self, max_functions: int | None = None, min_length: int = 0, max_length: int | None = None) -> None:
        self._max_functions = max_functions
        self._min_length = min_length
        self._max_length = max_length

    def files(self, path: Path | None) -> Sequence[Path]:
        """List the ``.py`` files below ``path``, sorted, without tests and installed packages.

        Default: the standard library.
        """
        root = _root(path)
        if root.is_file() and root.suffix == ".py":
            return [root]
        if root.is_file():
            raise InputError("uri", f"{root}: is no .py file; name one, or a folder of them")
        if not root.is_dir():
            raise InputError("uri", not_there(root))
        found = sorted(_python_files(root), key=lambda file: file.relative_to(root).as_posix())
        if not found:
            raise WMTPError(f"{root}: holds no Python source (.py) outside tests and installed packages")
        return found

    def first_examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Refuse a path that is neither source nor folder; yield nothing.

        A folder may hold many thousand files.
        """
        if path is not None and not path.is_dir():
            self.files(path)
        return iter(())

    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield the functions, ordered by file name and line."""
        root = _root(path)
        count = 0
        for file in self.files(path):
            name = file.name if file == root else file.relative_to(root).as_posix()
            try:
                found = _functions(file, name)
            except (SyntaxError, ValueError, RecursionError) as error:  # SyntaxError also for an unknown encoding
                line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
                yield BadExample(f"{file}{line}", f"not Python source that this Python reads ({error})")
                continue
            for example in found:
                length = len(example.prompt) + len(example.completion)
                if length < self._min_length or (self._max_length is not None and length > self._max_length):
                    continue
                yield example
                count += 1
                if count == self._max_functions:
                    return


def _root(path: Path | None) -> Path:
    return Path(sysconfig.get_paths()["stdlib"]) if path is None else path


def _python_files(folder: Path) -> Iterator[Path]:
    for file in files_below(folder, skipped=_SKIPPED_FOLDERS):
        if file.suffix == ".py" and not is_hidden(file.relative_to(folder).parent):
            require_target(file)
            yield file


def _functions(file: Path, name: str) -> list[Example]:
    with readable(file), tokenize.open(file) as stream:
        source = stream.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source
        module = ast.parse(source, filename=str(file))
    lines = source.split("\n")  # as ast counts lines; str.splitlines also splits at form feeds
    return list(_in_body(module, lines, file, f"{name}:"))


def _in_body(scope: ast.Module | ast.ClassDef, lines: list[str], file: Path, prefix: str) -> Iterator[Example]:
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from _in_body(node, lines, file, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts = _split(node, lines)
            if parts is not None:
                place = f"{prefix}{node.name}:{node.lineno}"
                yield Example(id=place, prompt=parts[0], completion=parts[1], where=f"{file}:{node.lineno}")


def _split(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    """Split a function into signature with docstring, and body.

    None without a docstring, or where the two share a line or its lines cannot be dedented.
    """
    if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
        return None
    first, last = node.lineno, node.end_lineno
    docstring_end = node.body[0].end_lineno
    if last is None or docstring_end is None or node.body[1].lineno <= docstring_end:
        return None
    indent = lines[first - 1][: node.col_offset]
    if indent.strip():
        return None
    own = lines[first - 1 : last]
    if not all(line.startswith(indent) or not line.strip() for line in own):
        return None  # a string inside reaches further left: taking the indent off would change it
    own = [line.removeprefix(indent).rstrip() if not line.strip() else line[len(indent) :] for line in own]
    cut = docstring_end - first + 1
    return "\n".join(own[:cut]) + "\n", "\n".join(own[cut:]) + "\n"
