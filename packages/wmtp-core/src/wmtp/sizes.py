"""Write and read sizes in bytes, and durations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["file_size", "format_bytes", "format_seconds", "parse_bytes", "parse_seconds"]

_UNITS: Final = {"": 1, **{f"{u}{i}".lower(): (1024 if i else 1000) ** n for n, u in enumerate("KMGT", 1) for i in ("", "i")}}
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?|)B?", re.IGNORECASE)


def file_size(path: Path) -> int:
    """Return the bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def format_bytes(count: float) -> str:
    """Write a number of bytes for a person."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def parse_bytes(text: str) -> int | None:
    """Read a size (``200GB``, ``1.5 TiB``); None for another text."""
    match = _SIZE.fullmatch(text.strip())
    return None if match is None else int(float(match[1]) * _UNITS[match[2].lower()])


def format_seconds(seconds: float) -> str:
    """Write a duration for a person, in its largest unit."""
    unit = next((unit for unit in "dhm" if seconds >= 2 * _SECONDS[unit]), "s")
    return f"{seconds / _SECONDS[unit]:.0f} {unit}"


def parse_seconds(text: str) -> float | None:
    """Read a duration (``24h``, ``90m``, ``7d``); None for another text."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([smhd])|0", text.strip())
    return None if match is None else float(match[1] or 0) * _SECONDS[match[2] or "s"]
