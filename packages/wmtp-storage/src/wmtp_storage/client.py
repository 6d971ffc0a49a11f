"""Client settings common to all stores: time limits, retries, proxies, certificates."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from attrs import frozen

from wmtp.errors import ConfigError
from wmtp_storage import retrying
from wmtp_storage.aio import run
from wmtp_storage.failures import WrongAnswerError
from wmtp_storage.retrying import with_retries

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

    from wmtp_storage.backend import StoredObject
    from wmtp_storage.checksums import StoreChecksum
    from wmtp_storage.config import RemoteStorage
    from wmtp_storage.leftovers import Unfinished

    #: what the store knows of an object's content; asked again, with True, where that did not match what came
    Checksum = Callable[[StoredObject, bool], StoreChecksum | None]
    #: the objects whose keys begin with a folder's (``a/b/``; empty for all), by pages
    Pages = Callable[[str], Iterator[Sequence[ObjectMeta]]]
    #: the keys of what is directly in a folder, for hints
    Names = Callable[[str], Iterable[str]]
    #: copies the object at the first key to the second
    Copy = Callable[[str, str], None]

__all__ = ["Opened", "ca_bundle", "client_options", "listed_pages", "opened"]

_PAGE = 1000  #: objects of a listing that are asked for at once
_ENDLESS = 60.0  #: seconds that a page may take at least
_UNCOUNTED = 10**6  #: retries go by time
_CA_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


def client_options(config: RemoteStorage, *, allow_http: bool, headers: Mapping[str, str] | None = None) -> ClientConfig:
    """Make the options of obstore's HTTP client.

    A request as a whole has no time limit, since a large range on a slow line may take long. A request that stalls is ended.
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
    """Return the file of additional certificates; None where none is configured.

    Raises:
        ConfigError: the configured file is not there.
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
        uploader: retries single requests, since a large file needs many; for up to ``retry_timeout``.
        store: does not retry: callers continue where it failed, see `wmtp_storage.retrying`.
        pages: lists a folder; raises `WrongAnswerError` where something else than the store answered.
        names: lists what is directly in a folder, for hints.
        copy: copies an object to another key of the store.
        checksum: of an object's content, as the store knows it.
        listed_checksum: what the listing says of it already; None where the store must be asked.
        unfinished: lists the uploads that were never ended of the objects whose keys begin with a text.
        abort: ends such uploads.
        buckets: the names of the buckets that these credentials may see, as far as they may: for hints.
    """

    uploader: ObjectStore
    store: ObjectStore
    pages: Pages
    names: Names
    copy: Copy
    checksum: Checksum
    listed_checksum: Callable[[StoredObject], StoreChecksum | None]
    unfinished: Callable[[str], Sequence[Unfinished]]
    abort: Callable[[Iterable[Unfinished]], None]
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
    unfinished: Callable[[str], Sequence[Unfinished]] = lambda _: (),
    abort: Callable[[Iterable[Unfinished]], None] = lambda _: None,
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
        unfinished: see `Opened`. Default: none, of a store that forgets them by itself.
        abort: see `Opened`.
        buckets: see `Opened`.
    """
    retries: RetryConfig = {
        "max_retries": _UNCOUNTED if config.retry_timeout else 0,
        "retry_timeout": timedelta(seconds=config.retry_timeout),
        "backoff": {
            "init_backoff": timedelta(seconds=retrying.FIRST_PAUSE),
            "max_backoff": timedelta(seconds=retrying.LONGEST_PAUSE),
            "base": 2,
        },
    }
    plain = store({"max_retries": 0})
    limit = config.retry_timeout
    return Opened(
        uploader=store(retries),
        store=plain,
        pages=pages if pages is not None else partial(listed_pages, plain, limit=limit),
        names=names if names is not None else partial(_names, plain),
        copy=copy if copy is not None else lambda a, b: with_retries(limit, b, lambda: obstore.copy(plain, a, b)),
        checksum=checksum if checksum is not None else lambda *_: None,
        listed_checksum=listed_checksum if listed_checksum is not None else lambda _: None,
        unfinished=unfinished,
        abort=abort,
        buckets=buckets,
    )


def listed_pages(store: ObjectStore, prefix: str, *, limit: float) -> Iterator[Sequence[ObjectMeta]]:
    """List a folder as obstore does, by pages of a thousand.

    A page that breaks off is asked for again.

    Args:
        store: makes no retries of its own.
        prefix: the folder's key and a slash; empty for all.
        limit: seconds after which a page is given up, also one that never ends.

    Raises:
        WrongAnswerError: pages follow each other without an object.
    """
    folder = prefix.rstrip("/") or None
    last: str | None = None
    is_over = False

    def more() -> Sequence[ObjectMeta]:
        return _first_page(store, folder, last, limit)

    while not is_over:
        page = with_retries(limit, folder or "the bucket", more)
        if page:
            last = page[-1]["path"]
            yield page
        is_over = len(page) < _PAGE


def _first_page(store: ObjectStore, folder: str | None, after: str | None, limit: float) -> Sequence[ObjectMeta]:
    """List the first thousand objects after a key, or fewer.

    Fewer are all that is left.
    """
    found: list[ObjectMeta] = []

    async def take() -> None:
        stream = obstore.list(store, prefix=folder, offset=after, chunk_size=_PAGE)
        try:
            async with asyncio.timeout(max(limit, _ENDLESS)):
                async for page in stream:
                    found.extend(page)
                    return
        except TimeoutError:
            raise WrongAnswerError("a listing has page after page without an object") from None

    run(take())
    return found


def _names(store: ObjectStore, prefix: str) -> list[str]:
    beside = obstore.list_with_delimiter(store, prefix=prefix.rstrip("/") or None)
    return [*beside["common_prefixes"], *(each["path"] for each in beside["objects"])]
