"""Files of one object a step, such as ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wmtp.errors import WMTPError

__all__ = ["last_steps", "read_steps"]


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read the objects of such a file, without a last line that a killed run left half-written.

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


def last_steps(path: Path) -> dict[str, int]:
    """Find the last step of each number in such a file; nothing where there is no file."""
    steps: dict[str, int] = {}
    for record in read_steps(path) if path.exists() else ():
        steps |= {name: record["step"] for name, value in record.items() if name != "step" and isinstance(value, int | float)}
    return steps
