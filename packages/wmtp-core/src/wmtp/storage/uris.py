"""Parsing of URIs, and choice of the storage backend that serves one."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote_to_bytes

from wmtp.errors import ConfigError
from wmtp.plugins.built import typed
from wmtp.plugins.loader import load_plugins
from wmtp.redaction import redact
from wmtp.storage.base import Storage, StoredFile

__all__ = ["backend_for", "check_answer", "file_path", "local_path", "localize", "scheme_of", "storage_scheme", "stored_files"]

_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # Linux'; others allow no more

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?")
_Answer = TypeVar("_Answer")
_Backend = TypeVar("_Backend")


def scheme_of(uri: str) -> str:
    """Return the scheme of ``uri`` in lower case.

    ``file`` for a plain path.

    Raises:
        ConfigError: ``uri`` is empty.
    """
    if not uri.strip():
        raise ConfigError("the URI is empty; write a path or a URI")
    match = _SCHEME.match(uri)
    # a colon is legal in a file's name; `backend_for` knows the schemes that make one a mistake
    return "file" if match is None or match[2] is None else match[1].lower()


def storage_scheme(uri: str, own_schemes: Collection[str]) -> str | None:
    """Return the scheme that a storage backend must serve.

    None for a path, and for a scheme that needs none.

    Args:
        uri: any text, as a tracker's ``tracking_uri``.
        own_schemes: those that need none, without what follows a ``+``.
    """
    scheme, slashes, _ = uri.lower().partition("://")
    return scheme if slashes and scheme.partition("+")[0] not in own_schemes else None


def file_path(uri: str) -> Path:
    """Return the absolute path of a path or a ``file:`` URI.

    A plain path is taken as it stands, with ``~`` and ``~user`` expanded, relative to the working folder; ``%`` means itself.
    In a ``file:`` URI percent-encoding is decoded. ``..`` and links mean what they mean to the operating system.

    Raises:
        ConfigError: it is no such URI.
    """
    if scheme_of(uri) != "file":
        raise ConfigError(f"{redact(uri)!r} is not on this machine; write a path or a file:/// URI")
    path = _decode(uri) if re.match("file:", uri, re.IGNORECASE) else uri
    if "\0" in path:
        raise ConfigError(f"{uri!r} holds a NUL character; a path cannot")
    if any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in path.split("/")) or len(path) >= _LONGEST_PATH:
        raise ConfigError(f"{uri[:40]!r}… is longer than a path can be; write the path of a file")
    try:
        # not every path: pathlib has forgotten the ./ of './~x' before it expands
        return Path.cwd() / (Path(path).expanduser() if path.startswith("~") else path)
    except RuntimeError:
        raise ConfigError(f"{uri!r}: there is no such user on this machine; write the path in full") from None


def local_path(given: str | os.PathLike[str], *, key: str | None = None) -> Path:
    """Return the path that was given, with ``~`` expanded.

    It may be a ``file:`` URI, too.

    Args:
        given: a path that this machine reads or writes itself.
        key: what it was given for, for messages.

    Raises:
        ConfigError: it is empty, a URI of elsewhere, or no path.
    """
    text = os.fspath(given)
    try:
        whole = file_path(text)
    except ConfigError as error:
        raise (error.under(key) if key else error) from None
    if re.match("file:", text, re.IGNORECASE):
        return whole
    return Path(text).expanduser() if text.startswith("~") else Path(text)  # './~x' is no home


def _decode(uri: str) -> str:
    """Decode the path of a ``file:`` URI (RFC 8089)."""
    rest = uri[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise ConfigError(f"{uri!r} names a host, {host!r}; for a path of this machine write file:///{rest[2:]}")
        rest = slash + path
    if not rest.startswith("/"):
        raise ConfigError(f"{uri!r} holds no absolute path; write file:///PATH, or a plain relative path without 'file:'")
    if wrong := re.search(r"[?#]|%(?![0-9A-Fa-f]{2})", rest):
        raise ConfigError(f"{uri!r}: {wrong[0]!r} in the name of a file must be written %{ord(wrong[0]):02X} in a URI")
    return os.fsdecode(unquote_to_bytes(rest))


def backend_for(uri: str, backends: Mapping[str, _Backend], *, key: str | None = None) -> _Backend:
    """Return the backend that serves ``uri``.

    Args:
        uri: a URI or a plain path.
        backends: scheme → backend, or its config class.
        key: the dotted config key that ``uri`` comes from, for messages.

    Raises:
        ConfigError: the URI is wrong, or no installed plugin serves its scheme.
    """
    try:
        scheme = scheme_of(uri)
        if scheme == "file":
            _check_slashes(uri, backends)
            file_path(uri)
        if scheme not in backends:
            raise ConfigError(_no_backend(uri, scheme, backends))
    except ConfigError as error:
        raise (error.under(key) if key else error) from None
    return backends[scheme]


def _check_slashes(uri: str, schemes: Collection[str]) -> None:
    """Refuse ``s3:bucket/x`` where a backend serves ``s3://``."""
    match = _SCHEME.match(uri)
    if match is not None and (scheme := match[1].lower()) != "file" and scheme in schemes:
        rest = uri[match.end() :].lstrip("/")
        raise ConfigError(f"{redact(uri)!r} is no URI; write {redact(f'{scheme}://{rest}')!r}")


def _no_backend(uri: str, scheme: str, schemes: Collection[str]) -> str:
    installed = ", ".join(f"{name}://" for name in sorted(schemes))
    remedy = load_plugins().remedy("storages", scheme)
    return f"{redact(uri)!r}: no installed plugin serves {scheme}:// URIs; installed: {installed}{remedy}"


def localize(uri: str, backends: Mapping[str, Storage], cache_dir: Path, *, key: str | None = None) -> Path:
    """Make ``uri`` readable on this machine, and return its local path.

    Args:
        uri: a URI or a plain path.
        backends: scheme → backend.
        cache_dir: where fetched files are kept.
        key: the dotted config key that ``uri`` comes from, for messages.

    Raises:
        ConfigError: the URI is wrong, or no installed plugin serves its scheme.
        WMTPError: nothing is there, or it could not be read.
    """
    backend = backend_for(uri, backends, key=key)
    try:
        found = backend.localize(uri, cache_dir)
    except ConfigError as error:
        raise (error.under(key) if key else error) from error
    return check_answer(backend, "localize", Path, found)


def stored_files(backend: Storage, uri: str) -> Iterator[StoredFile]:
    """List the files at ``uri``, and validate what the backend gives.

    Raises:
        PluginError: it is something else.
        WMTPError: the backend cannot tell, or could not be asked.
    """
    for file in check_answer(backend, "files", Iterable, backend.files(uri)):
        yield check_answer(backend, "files", StoredFile, file)


def check_answer(backend: Storage, method: str, wanted: type[_Answer], found: object) -> _Answer:
    """Validate the type of what a backend has returned.

    Raises:
        PluginError: it has another one.
    """
    return typed(f"the storage backend {type(backend).__module__}.{type(backend).__qualname__}", method, wanted, found)
