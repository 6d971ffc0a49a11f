"""Files of one object a step, such as ``metrics.jsonl``: they are right whatever the tracker does, and after a resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp.errors import WMTPError

__all__ = ["StepFile", "read_steps"]


class StepFile:
    """Appends steps to a file of JSON lines.

    Args:
        path: the file.
        resumed_step: lines of later steps, which the interrupted run wrote after its last checkpoint, are taken out: the
            resumed run writes them again.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in read_steps(path) if line["step"] <= resumed_step] if path.exists() else []
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            partial.write_text("".join(_line(record) for record in kept))
            partial.replace(path)
            self._file = path.open("a")
        except OSError as error:
            raise WMTPError(f"{path} cannot be written: {error}") from error
        self.path = path

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one step.

        Args:
            step: optimizer steps done.
            values: by name; those that are not a number (a head without predictions) are left out.

        Raises:
            WMTPError: the disk is full, or the file cannot be written for another reason.
        """
        try:
            self._file.write(_line({"step": step} | dict(values)))
            self._file.flush()
        except OSError as error:
            raise WMTPError(f"{self.path} cannot be written: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The objects of a `StepFile`. A last line that a killed run left half-written is passed over.

    Raises:
        WMTPError: another line is damaged.
    """
    records = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise WMTPError(f"{path}:{number}: not the record of a step; remove this line") from None
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    known = {name: value for name, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
    return json.dumps(known) + "\n"
