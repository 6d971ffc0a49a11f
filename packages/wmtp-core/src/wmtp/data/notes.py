"""Remarks on a data set, reported once each with the number of documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from attrs import frozen

__all__ = ["Note", "Notes"]


@frozen(kw_only=True)
class Note:
    """A remark.

    Args:
        text: about the documents.
        count: how many it is about.
        first: where the first of them stands.
        level: ``warning`` or ``info``.
    """

    text: str
    count: int
    first: str
    level: str = "warning"

    def of(self, documents: int) -> str:
        """Write the remark, with the number of all documents that were read."""
        place = "at" if self.count == 1 else "the first at"
        return f"{self.count:,} of {documents:,} documents ({place} {self.first}): {self.text}"


class Notes:
    """Collects remarks while documents are read."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], list[str | int]] = {}

    def add(self, text: str, where: str, *, level: str = "warning", subject: str = "") -> None:
        """Note something about the document at ``where``; of one document it counts once.

        Args:
            text: the remark.
            where: the document.
            level: ``warning`` or ``info``.
            subject: replaces ``{}`` in ``text``. Remarks on the same documents that differ in it alone become one.
        """
        entry = self._found.setdefault((text, level, subject), [0, where, ""])
        if entry[2] != where:
            entry[0], entry[2] = int(entry[0]) + 1, where

    def state(self) -> Sequence[tuple[str, str, str, str | int, str | int]]:
        """Return what `restore` takes."""
        return [(*key, count, first) for key, (count, first, _) in self._found.items()]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Continue from the remarks on the documents before."""
        self._found = {(text, level, subject): [count, first, ""] for text, level, subject, count, first in state}

    def list(self) -> tuple[Note, ...]:
        """All of them, in the order in which they came up."""
        subjects: dict[tuple[str, str, int, str], list[str]] = {}
        for (text, level, subject), (count, first, _) in self._found.items():
            subjects.setdefault((text, level, int(count), str(first)), []).append(subject)
        return tuple(
            Note(text=text.replace("{}", ", ".join(names)) if names[0] else text, count=count, first=first, level=level)
            for (text, level, count, first), names in subjects.items()
        )
