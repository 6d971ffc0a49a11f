"""Printing of facts as aligned lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wmtp.redaction import redact

if TYPE_CHECKING:
    from wmtp.data.shown import ShownDocument

__all__ = ["print_documents", "print_facts"]


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print one fact a line with aligned values; None is left out."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if value is not None:
            print(redact(f"{name:<{width}}  {value}"))


def print_documents(documents: Sequence[ShownDocument]) -> None:
    """Print documents as they will be learned.

    In colour on a terminal, unless ``NO_COLOR`` is set.
    """
    from wmtp.data.shown import LEGEND

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(f"documents as they will be learned ({LEGEND})")
    for document in documents:
        print(redact(document.text(colour=colour)))
