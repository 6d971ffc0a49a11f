"""Remarks on a data set, each with its number of documents."""

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
        among: how many documents, the first ones, were looked at; None: all.
    """

    text: str
    count: int
    first: str
    level: str = "warning"
    among: int | None = None

    def of(self, documents: int) -> str:
        """Write the remark, with the number of all documents that were read."""
        place = "at" if self.count == 1 else "the first at"
        if self.among is not None and self.among < documents:
            return f"{self.count:,} of the first {self.among:,} documents ({place} {self.first}): {self.text}"
        return f"{self.count:,} of {documents:,} documents ({place} {self.first}): {self.text}"


class Notes:
    """Collects remarks while documents are read."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str, int | None], list[str | int]] = {}

    def add(self, text: str, where: str, *, level: str = "warning", subject: str = "", among: int | None = None) -> None:
        """Note something about the document at ``where``.

        It counts once a document.

        Args:
            text: the remark.
            where: the document.
            level: ``warning`` or ``info``.
            among: see `Note`.
            subject: replaces ``{}`` in ``text``. Remarks on the same documents that differ in it alone become one.
        """
        entry = self._found.setdefault((text, level, subject, among), [0, where, ""])
        if entry[2] != where:
            entry[0], entry[2] = int(entry[0]) + 1, where

    def state(self) -> Sequence[tuple[str | int | None, ...]]:
        """Return what `restore` takes."""
        return [(*key, count, first) for key, (count, first, _) in self._found.items()]

    def restore(self, state: Iterable[Sequence[Any]]) -> None:
        """Continue from the remarks on the documents before."""
        self._found = {tuple(key): [count, first, ""] for *key, count, first in state}

    def list(self) -> tuple[Note, ...]:
        """All of them, in the order in which they came up."""
        subjects: dict[tuple[str, str, int | None, int, str], list[str]] = {}
        for (text, level, subject, among), (count, first, _) in self._found.items():
            subjects.setdefault((text, level, among, int(count), str(first)), []).append(subject)
        return tuple(
            Note(
                text=text.replace("{}", ", ".join(names)) if names[0] else text,
                count=count,
                first=first,
                level=level,
                among=among,
            )
            for (text, level, among, count, first), names in subjects.items()
        )
