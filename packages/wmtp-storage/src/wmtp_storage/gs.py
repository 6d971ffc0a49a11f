"""Google Cloud Storage."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import obstore
from obstore.store import GCSStore

from wmtp_storage.client import Opened, client_options, listed_pages, opened
from wmtp_storage.failures import WrongAnswerError
from wmtp_storage.retrying import with_retries

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import RetryConfig

    from wmtp_storage.config import GoogleStorage
    from wmtp_storage.uris import RemoteURI

__all__ = ["open_gs"]


def open_gs(config: GoogleStorage, uri: RemoteURI) -> Opened:
    """Open a bucket. obstore itself looks for credentials in Google's standard places."""
    options: dict[str, Any] = {"skip_signature": True} if config.anonymous else {}
    endpoint = config.endpoint or os.environ.get("GOOGLE_BASE_URL")
    if endpoint is not None:
        options["base_url"] = endpoint.rstrip("/")

    def store(retries: RetryConfig) -> GCSStore:
        return GCSStore(
            uri.authority,
            config=options,  # type: ignore[arg-type]
            client_options=client_options(config, allow_http=(endpoint or "").startswith("http://")),
            retry_config=retries,
        )

    asked = store({"max_retries": 0})
    return opened(config, store, pages=lambda prefix: _pages(asked, prefix, config.retry_timeout))


def _pages(store: GCSStore, prefix: str, limit: float) -> Iterator[Sequence[ObjectMeta]]:
    """List a folder, and verify an empty end.

    obstore takes a proxy's login page for an empty listing, and only its own client has the credentials to list by. So the
    listing is made again, and an object is asked for that does not exist: a proxy reports that it does, or answers something
    else.

    Raises:
        WrongAnswerError: something else than the store answers.
    """
    count = 0
    for page in listed_pages(store, prefix, limit=limit):
        count += len(page)
        yield page
    try:
        with_retries(limit, prefix, lambda: obstore.head(store, f"{prefix}{secrets.token_hex(16)}"))
    except FileNotFoundError:
        if count == sum(map(len, listed_pages(store, prefix, limit=limit))):
            return
        raise WrongAnswerError("two listings, one after the other, differ in length") from None
    raise WrongAnswerError("the store reports an object that was never created")
