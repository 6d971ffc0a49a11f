"""Result of a study: a table, and the state of each run."""

from __future__ import annotations

import csv
import html
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import field, fields, frozen

from wmtp.errors import WMTPError
from wmtp.json_files import writing
from wmtp.studies.record import RunRecord
from wmtp.studies.table import Row, StudyTable, as_dicts

__all__ = ["TABLE_HEADS", "StudyResult", "left_line", "text_lines"]

_COLUMNS: Final = [attribute.name for attribute in fields(Row)]

TABLE_HEADS: Final = ("metric", "arm", "n", "mean ± sd", "compared to", "difference [95 %]", "verdict")


@frozen(kw_only=True)
class StudyResult:
    """Result of `study`: a table, and what became of each run.

    Args:
        folder: of the study.
        table: what was found.
        finished: records of the runs that count, by name.
        failed: why runs failed or could not begin, by name.
        left: names of the runs that are still to be done.
        facts: what a dry run says, by name.
    """

    folder: Path
    table: StudyTable
    finished: Mapping[str, RunRecord]
    failed: Mapping[str, str]
    left: Sequence[str]
    facts: Mapping[str, str] = field(factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping for each metric and arm; see `wmtp.studies.table.Row`."""
        return as_dicts(self.table.rows)

    def __len__(self) -> int:
        return len(self.table.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.table.rows)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str | None:
        """Write the table as CSV; without a path return it."""
        out = io.StringIO()
        writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        if path is None:
            return out.getvalue()
        with writing(Path(path)):
            Path(path).write_text(out.getvalue(), encoding="utf-8")
        return None

    def to_pandas(self) -> Any:
        """Return the table as a pandas DataFrame.

        Raises:
            WMTPError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise WMTPError("to_pandas: pandas is not installed; pip install pandas, or use rows or to_csv") from None
        return pandas.DataFrame(self.rows, columns=_COLUMNS)

    def _repr_html_(self) -> str:
        """Render the sentence and the table for a notebook."""
        cells = [[html.escape(cell) for cell in line] for line in text_lines(self.table)]
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in cells)
        head = "".join(f"<th>{name}</th>" for name in TABLE_HEADS)
        return f"<p>{html.escape(self.table.sentence())}</p><table><tr>{head}</tr>{body}</table>"


def text_lines(table: StudyTable) -> list[list[str]]:
    """Lay out the table as cells of text, under `TABLE_HEADS`."""
    lines = []
    for row in table.rows:
        spread = "" if row.sd is None else f" ± {row.sd:.2g}"
        interval = "" if row.low is None or row.high is None else f" [{row.low:+.4g}, {row.high:+.4g}]"
        difference = "" if row.difference is None else f"{row.difference:+.4g}{interval}"
        lines.append([row.metric, row.arm, str(row.n), f"{row.mean:.4g}{spread}", row.to or "", difference, row.verdict])
    return lines


def left_line(left: Sequence[str]) -> str:
    """Say how many runs are still to be done."""
    return f"{len(left)} {'run is' if len(left) == 1 else 'runs are'} left; the same command continues"
