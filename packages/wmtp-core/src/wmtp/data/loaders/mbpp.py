"""MBPP: short Python problems with tests (Google Research, arXiv 2108.07732)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wmtp.data.base import BadExample, Example
from wmtp.data.fields import keys_of, name_field, text_field, type_name
from wmtp.data.files import given_path
from wmtp.data.loaders.records import RecordLoader
from wmtp.data.splits import data_files

__all__ = ["MbppLoader", "MbppProblem", "mbpp_problem", "mbpp_prompt"]


class MbppLoader(RecordLoader):
    """Reads the problems; see `wmtp.data.config.Mbpp`.

    Args:
        split: which file of a folder.
    """

    def __init__(self, split: str) -> None:
        super().__init__(split)

    def files(self, path: Path | None) -> Sequence[Path]:
        """List the file ``path``, or those of the split in that folder."""
        path = given_path(path)
        # the default says nothing of a file that is named
        return data_files(path) if path.is_file() and self._split == "train" else super().files(path)

    def _record(self, where: str, record: Mapping[str, Any], *, columns: bool) -> Iterator[Example]:
        found = mbpp_problem(where, record)
        yield Example(id=found.id, prompt=mbpp_prompt(found.text, found.tests), completion=found.code, where=where)


class MbppProblem(NamedTuple):
    """Fields of a problem: its id, the task, a solution, and assertions."""

    id: str
    text: str
    code: str
    tests: list[str]


def mbpp_problem(where: str, record: Mapping[str, Any]) -> MbppProblem:
    """Read a record's fields.

    Raises:
        BadExample: one is missing, or of another type.
    """
    tests = record.get("test_list")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise BadExample(where, f'"test_list" must be a list of strings, not {type_name(tests)}')
    number = name_field(record, "task_id")
    if not number:
        raise BadExample(where, f'no "task_id"; {keys_of(record)}')
    return MbppProblem(f"mbpp/{number}", text_field(where, record, "text"), text_field(where, record, "code"), tests)


def mbpp_prompt(text: str, tests: Sequence[str]) -> str:
    '''Write a problem's prompt, a docstring of task and tests::

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
