"""MBPP: short Python problems with tests (Google Research, arXiv 2108.07732)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.fields import text_field, type_name
from wmtp.data.files import data_files, given_path, parsed, uncompressed_name
from wmtp.errors import WMTPError

__all__ = ["MbppLoader", "mbpp_prompt"]


class MbppLoader(ExampleLoader):
    """Reads the problems; see `wmtp.data.config.Mbpp`.

    Args:
        split: which file of a folder.
    """

    def __init__(self, split: str) -> None:
        self._split = split

    def files(self, path: Path | None) -> Sequence[Path]:
        """Return the file ``path``, or the split's file in that folder."""
        path = given_path(path)
        found = data_files(path)
        if path.is_file():
            stem = Path(uncompressed_name(path)).stem
            if self._split != "train" and stem.partition("-")[0] != self._split:
                raise WMTPError(
                    f"{path}: is one file, of which split = '{self._split}' chooses nothing; remove split, or name the folder"
                )
            return found
        matching = [file for file in found if Path(uncompressed_name(file)).stem.partition("-")[0] == self._split]
        if len(matching) != 1:
            names = ", ".join(file.name for file in found)
            raise WMTPError(
                f"{path}: needs one file for the split '{self._split}' (such as {self._split}.jsonl); holds {names}"
            )
        return matching

    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield the problems in the order of the file."""
        for file in self.files(path):
            yield from parsed(file, _examples)


def _examples(where: str, record: Mapping[str, Any]) -> Iterator[Example]:
    tests = record.get("test_list")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise BadExample(where, f'"test_list" must be a list of strings, not {type_name(tests)}')
    number = record.get("task_id")
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise BadExample(where, f'"task_id" must be a number or a string, not {type_name(number)}')
    prompt = mbpp_prompt(text_field(where, record, "text"), tests)
    yield Example(id=f"mbpp/{number}", prompt=prompt, completion=text_field(where, record, "code"), where=where)


def mbpp_prompt(text: str, tests: Sequence[str]) -> str:
    '''Write a problem's prompt: a docstring of the task and its tests, before the code::

        """
        Write a function to reverse a string.
        assert reverse("ab") == "ba"
        """

    Args:
        text: the task.
        tests: assertions.
    '''
    lines = [text, *tests]
    body = "\n".join(line.replace("\r\n", "\n").strip() for line in lines)
    return f'"""\n{body}\n"""\n'
