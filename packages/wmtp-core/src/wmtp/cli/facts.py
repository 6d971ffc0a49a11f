"""Printing of facts as aligned lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wmtp.redaction import redact

__all__ = ["print_facts"]


def print_facts(facts: Mapping[str, Any]) -> None:
    """One line a fact, the values under each other; None is left out."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if value is not None:
            print(redact(f"{name:<{width}}  {value}"))
