"""Text of a record that is in none of its examples."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

__all__ = ["unread_keys"]


def unread_keys(record: Mapping[str, Any], content: Collection[str], labels: Collection[str]) -> tuple[str, ...]:
    """Find a record's keys whose text is not learned.

    Text that is a part of what is read is none of it, nor is text that holds all of that, as a rendered copy does.

    Args:
        record: as read from the file.
        content: its keys that become the example's text.
        labels: its keys that are read besides.
    """
    rest = [key for key in record if key not in content and key not in labels]
    if not rest:
        return ()
    texts = [text for key in content for text in _texts(record.get(key))]

    def is_known(text: str) -> bool:
        return any(text in each for each in texts) or all(each in text for each in texts)

    return tuple(str(key) for key in rest if not all(is_known(text) for text in _texts(record[key])))


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value that is not white space alone."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip().replace("\r\n", "\n")
    elif isinstance(value, Mapping):
        for element in value.values():
            yield from _texts(element)
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _texts(element)
