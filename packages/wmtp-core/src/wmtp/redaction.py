"""Redaction of addresses in messages and files.

It goes by their form, for no list of secret names is whole.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["clean_chain", "holds_credentials", "redact"]

#: keys of a query that hold no secret, in small letters
_HARMLESS: Final = frozenset(("alt", "branch", "charset", "download", "format", "list-type", "partnumber", "raw")) | frozenset(
    ("ref", "region", "rev", "revision", "sslmode", "timeout", "version", "versionid")
)
#: with their slashes, or of a scheme whose slashes are easily forgotten
_URI: Final = re.compile(r"\b(?:[A-Za-z][A-Za-z0-9+.-]*://|(?:https?|s3|gs|az|abfss?):/*)[^\s\"'<>`]+")
#: up to the last @ before the path; after a colon that begins no port, a password may hold a slash
_USER: Final = re.compile(r"(?P<start>:/*)(?:[^/?#@\s]*@(?:[^/?#@\s]*@)*|[^/?#\s:@]*:(?!\d+(?:[/?#]|$))\S*@)")
_CONTAINER: Final = re.compile(r"abfss?://[^/?#@:]+@", re.IGNORECASE)  # abfss://CONTAINER@ACCOUNT
#: ends a sentence, not an address
_STOP: Final = re.compile(r"[.,;:!)\]}]*$")
#: behind a path with a space in it
_QUERY: Final = re.compile(r"[?#][^\s?#=&\"'<>`]*=[^\s\"'<>`]*")
#: a query as libraries show the parts of an address
_PART: Final = re.compile(r"(\b(?:query|password|username|fragment):? ?[=:] ?(?:Some\()?)(['\"])(?:(?!\2).)*\2")


def redact(text: str) -> str:
    """Remove user info and queries from all addresses in a text.

    Keys of a query that are known to be harmless stay.
    """
    if not _URI.search(text):
        return _PART.sub(r"\1\2\2", text)
    for pattern in (_URI, _QUERY):
        text = pattern.sub(lambda match: _redacted(match[0]), text)
    return _PART.sub(r"\1\2\2", text)


def holds_credentials(text: str) -> bool:
    """Tell whether addresses in a text hold a query or user info.

    A user's name alone does not count in the addresses of databases, and of programs for other machines.
    """
    for match in _URI.finditer(text):
        uri = match[0]
        name, has_user, _ = uri.partition("@")
        is_name_only = has_user and ":" not in name.partition("://")[2] and not re.match(r"https?|s3|gs", uri, re.IGNORECASE)
        if _redacted(uri) != (_USER.sub(r"\g<start>", uri, count=1) if is_name_only else uri):
            return True
    return bool(_URI.search(text)) and any(_redacted(match[0]) != match[0] for match in _QUERY.finditer(text))


def clean_chain(error: BaseException) -> None:
    """Redact the messages of an error and of all its causes."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        cleaned = tuple(redact(value) if isinstance(value, str) else value for value in each.args)
        if cleaned != each.args:
            each.args = cleaned
        left += [each.__cause__, each.__context__]


def _redacted(uri: str) -> str:
    stop = _STOP.search(uri)
    end = stop[0] if stop is not None else ""
    uri = uri.removesuffix(end) if end else uri
    place, hash_mark, fragment = uri.partition("#")
    place, _, query = place.partition("?")
    if not _CONTAINER.match(place):
        place = _USER.sub(r"\g<start>", place, count=1)
    kept = [pair for pair in re.split(r"[&;]", query) if pair.partition("=")[0].lower() in _HARMLESS]
    shown = f"{place}?{'&'.join(kept)}" if kept else place
    return f"{shown}{f'#{fragment}' if hash_mark and '=' not in fragment and '@' not in fragment else ''}{end}"
