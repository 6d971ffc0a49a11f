"""Files of one object a step, such as ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wmtp.errors import WMTPError

__all__ = ["read_steps"]


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
