"""URIs of object stores."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from attrs import frozen

from wmtp.errors import ConfigError
from wmtp.redaction import redact
from wmtp.storage.uris import scheme_of

__all__ = ["RemoteURI", "parse"]


@frozen
class RemoteURI:
    """A URI, taken apart.

    Args:
        scheme: in lower case.
        authority: the bucket, the container, or host and port.
        key: the path inside, decoded, without slashes at its ends; empty for a whole bucket.
        query: of an HTTP URL, without its ``?``; it may hold a signature.
        is_folder: whether the URI ends with a slash, and so never names a file.
    """

    scheme: str
    authority: str
    key: str
    query: str = ""
    is_folder: bool = False

    def __str__(self) -> str:
        """For messages: without the query, which may be a secret."""
        return f"{self.scheme}://{self.authority}/{quote(self.key)}" if self.key else f"{self.scheme}://{self.authority}"

    def at(self, name: str) -> RemoteURI:
        """Return the URI of ``name`` in this folder.

        The URI itself for an empty name.
        """
        return RemoteURI(self.scheme, self.authority, "/".join(filter(None, (self.key, name))), self.query)


def parse(uri: str) -> RemoteURI:
    """Take a URI apart.

    Percent-escapes in its path are decoded; spaces and letters of any alphabet may stand as they are.

    Raises:
        ConfigError: it names no bucket, or no place inside it.
    """
    scheme = scheme_of(uri)
    shown = repr(re.split(r"[?#]", redact(uri), maxsplit=1)[0])
    is_web = scheme.startswith("http")
    authority, _, rest = uri.partition("://")[2].partition("/")
    if not re.split(r"[?#]", authority, maxsplit=1)[0].rpartition("@")[2]:
        place = "host" if is_web else "bucket"
        raise ConfigError(f"{shown} names no {place}; write {scheme}://{place.upper()}/PATH")
    path, mark, query = rest.partition("?")
    place = re.split(r"[?#]", uri, maxsplit=1)[0]
    if redact(place) != place or ("@" in authority and scheme not in ("abfs", "abfss")):
        raise ConfigError(f"{shown} holds a user's name; remove it: credentials come from the environment")
    if "?" in authority or "#" in authority:
        raise ConfigError(f"{shown}: a '/' must be between the {'host' if is_web else 'bucket'} and what follows")
    if "#" in rest or (mark and not is_web):
        raise ConfigError(f"{shown}: in a name '?' must be written %3F, and '#' %23")
    if wrong := re.search(r"%(?![0-9A-Fa-f]{2})", path):
        raise ConfigError(f"{shown}: '%' in a name must be written %25 (at character {wrong.start() + 1} of the path)")
    try:
        decoded = unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError(f"{shown}: what its %-escapes stand for is no UTF-8 text") from None
    key = decoded.removesuffix("/")
    parts = key.split("/") if key else []
    if ".." in parts or "." in parts:
        raise ConfigError(f"{shown}: '.' and '..' mean nothing in an object store; write the path out")
    if "" in parts:
        raise ConfigError(f"{shown}: there is nothing between two slashes; write one '/'")
    if control := re.search(r"[\x00-\x1f\x7f]", key):
        raise ConfigError(f"{shown}: holds the control character {control[0]!r}, which no file is named by")
    return RemoteURI(scheme, authority, key, query, is_folder=decoded.endswith("/"))
