"""What the clients of all stores have in common: time limits, retries, proxies, certificates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from attrs import frozen

from wmtp.errors import ConfigError

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

    from wmtp_storage.backend import StoredObject
    from wmtp_storage.checksums import StoreChecksum
    from wmtp_storage.config import RemoteStorage

    #: what the store knows of an object's content; asked again, with True, where that did not match what came
    Checksum = Callable[[StoredObject, bool], StoreChecksum | None]
    #: the objects whose keys begin with a folder's (``a/b/``; empty for all), by pages
    Pages = Callable[[str], Iterator[Sequence[ObjectMeta]]]
    #: the keys of what is directly in a folder, for hints
    Names = Callable[[str], Iterable[str]]
    #: copies the object at the first key to the second
    Copy = Callable[[str, str], None]

__all__ = ["Opened", "ca_bundle", "client_options", "listed_pages", "opened"]

_CA_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


def client_options(config: RemoteStorage, *, allow_http: bool, headers: Mapping[str, str] | None = None) -> ClientConfig:
    """The options of obstore's HTTP client.

    A request as a whole has no time limit: a large range on a slow line takes as long as it takes. One that stalls does.
    """
    options: dict[str, Any] = {
        "allow_http": allow_http,
        "connect_timeout": timedelta(seconds=config.connect_timeout),
        "read_timeout": timedelta(seconds=config.read_timeout),
        "timeout": timedelta(days=1),
        "pool_max_idle_per_host": str(config.max_connections),
        "user_agent": "wmtp-storage",
    }
    if config.proxy is not None:
        options["proxy_url"] = config.proxy
        if excluded := os.environ.get("NO_PROXY", os.environ.get("no_proxy")):
            options["proxy_excludes"] = excluded
    if (bundle := ca_bundle(config)) is not None:
        options["root_certificate"] = bundle.read_bytes()
    if headers:
        options["default_headers"] = dict(headers)
    return options  # type: ignore[return-value]


def ca_bundle(config: RemoteStorage) -> Path | None:
    """The file of additional certificates; None where nothing names one.

    Raises:
        ConfigError: the file that is named is not there.
    """
    named = [("ca_bundle", config.ca_bundle), *((name, os.environ.get(name)) for name in _CA_VARIABLES)]
    for name, value in named:
        if value:
            path = Path(value).expanduser()
            if not path.is_file():
                raise ConfigError(f"{name}: {value!r} is no file; write the path of a PEM file with certificates")
            return path
    return None


@frozen
class Opened:
    """A store, opened twice, and what else it can tell.

    Args:
        store: tries a failed request again by itself.
        reader: does not: whoever reads from it goes on where it failed.
        pages: lists a folder; raises `WrongAnswerError` where something else than the store answered.
        names: lists what is directly in a folder, for hints.
        copy: copies an object to another key of the store.
        checksum: of an object's content, as the store knows it.
        listed_checksum: what the listing says of it already; None where the store must be asked.
        abort_uploads: ends what was never uploaded to its end in a folder, which is given by its key.
        buckets: the names of the buckets that these credentials may see, as far as they may: for hints.
    """

    store: ObjectStore
    reader: ObjectStore
    pages: Pages
    names: Names
    copy: Copy
    checksum: Checksum
    listed_checksum: Callable[[StoredObject], StoreChecksum | None]
    abort_uploads: Callable[[str], None]
    buckets: Callable[[], list[str]]


def opened(
    config: RemoteStorage,
    store: Callable[[RetryConfig], ObjectStore],
    *,
    pages: Pages | None = None,
    names: Names | None = None,
    copy: Copy | None = None,
    checksum: Checksum | None = None,
    listed_checksum: Callable[[StoredObject], StoreChecksum | None] | None = None,
    abort_uploads: Callable[[str], None] | None = None,
    buckets: Callable[[], list[str]] = list,
) -> Opened:
    """Open a store.

    Args:
        config: of the backend.
        store: makes it. Retries are made with backoff and jitter: of server errors, 429, time-outs and lost connections.
        pages: see `Opened`; None: as obstore lists.
        names: see `Opened`; None: as obstore lists.
        copy: see `Opened`; None: as obstore copies.
        checksum: see `Opened`; None for a store that tells none.
        listed_checksum: see `Opened`; None for a store whose listing tells none.
        abort_uploads: see `Opened`; None for a store that forgets them by itself.
        buckets: see `Opened`.
    """
    retries: RetryConfig = {
        "max_retries": config.max_retries,
        "retry_timeout": timedelta(seconds=config.retry_timeout),
        "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=15), "base": 2},
    }
    patient = store(retries)
    return Opened(
        store=patient,
        reader=store({"max_retries": 0}),
        pages=pages if pages is not None else partial(listed_pages, patient),
        names=names if names is not None else partial(_names, patient),
        copy=copy if copy is not None else partial(obstore.copy, patient),
        checksum=checksum if checksum is not None else lambda *_: None,
        listed_checksum=listed_checksum if listed_checksum is not None else lambda _: None,
        abort_uploads=abort_uploads if abort_uploads is not None else lambda _: None,
        buckets=buckets,
    )


def listed_pages(store: ObjectStore, prefix: str) -> Iterator[Sequence[ObjectMeta]]:
    """List a folder as obstore does, by pages of a thousand."""
    return iter(obstore.list(store, prefix=prefix.rstrip("/") or None, chunk_size=1000))


def _names(store: ObjectStore, prefix: str) -> list[str]:
    beside = obstore.list_with_delimiter(store, prefix=prefix.rstrip("/") or None)
    return [*beside["common_prefixes"], *(each["path"] for each in beside["objects"])]
