"""Files of one object a step, such as ``metrics.jsonl``."""

from __future__ import annotations

import json
import logging
from itertools import count
from pathlib import Path
from typing import Any

from wmtp.errors import FileError, WMTPError
from wmtp.json_files import DAMAGE, reading
from wmtp.storage.atomic import replace_text

__all__ = ["last_steps", "merge_steps", "read_steps", "set_aside_damaged", "warn_of_gap"]

logger = logging.getLogger("wmtp")


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read a file's records, without a half-written last line.

    Raises:
        FileError: another line is damaged, or the file cannot be read.
    """
    records = []
    with reading(path):
        lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            if number == len(lines):
                break
            raise FileError(f"{path}:{number}: not the record of a step; remove this line")
        records.append(record)
    return records


def set_aside_damaged(path: Path) -> None:
    """Keep a damaged file's readable records, and the original beside it.

    Raises:
        WMTPError: it cannot be written.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
        good = [line for line in lines if _record(line) is not None]
        if len(good) >= len(lines) - (bool(lines) and _record(lines[-1]) is None):
            return  # whole, but for a last line that a kill has cut
        aside = next(p for n in count(1) if not (p := path.with_name(f"{path.name}.damaged-{n}")).exists())
        path.rename(aside)
        path.write_text("".join(f"{line}\n" for line in good))
    except FileNotFoundError:
        return
    except OSError as error:
        raise WMTPError(f"{path} cannot be repaired: {error.strerror or error}") from error
    logger.warning("%s is damaged: %d of its %d lines are kept; as it was it is in %s", path, len(good), len(lines), aside.name)


def merge_steps(path: Path, other: Path) -> None:
    """Merge the records of two files by step; ``other`` wins.

    Raises:
        WMTPError: one is damaged, or cannot be written.
    """
    found = {record["step"]: record for file in (path, other) if file.exists() for record in read_steps(file)}
    replace_text(path, "".join(json.dumps(found[step]) + "\n" for step in sorted(found)))


def warn_of_gap(path: Path, step: int, interval: int) -> None:
    """Warn of steps before a resume that have no record.

    The curve cannot be had again.

    Args:
        path: ``metrics.jsonl``.
        step: done before the resume.
        interval: steps between two records.
    """
    steps = {record["step"] for record in read_steps(path)} if path.exists() else set[int]()
    missing = [number for number in range(interval, step + 1, interval) if number not in steps]
    if missing:
        logger.warning(
            "%s lacks %d of the steps before this resume (%d to %d); training continues, and the curve lacks them",
            path, len(missing), missing[0], missing[-1],
        )  # fmt: skip


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except DAMAGE:
        return None


def last_steps(path: Path) -> dict[str, int]:
    """Find each number's last step; empty where there is no file."""
    steps: dict[str, int] = {}
    for record in read_steps(path) if path.exists() else ():
        steps |= {name: record["step"] for name, value in record.items() if name != "step" and isinstance(value, int | float)}
    return steps
