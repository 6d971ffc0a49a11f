"""Google Cloud Storage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from obstore.store import GCSStore

from wmtp_storage.client import Opened, client_options, opened

if TYPE_CHECKING:
    from wmtp_storage.config import GoogleStorage
    from wmtp_storage.uris import RemoteURI

__all__ = ["open_gs"]


def open_gs(config: GoogleStorage, uri: RemoteURI) -> Opened:
    """The store of a bucket. obstore itself looks for credentials in Google's standard places."""
    options: dict[str, Any] = {"skip_signature": True} if config.anonymous else {}
    endpoint = config.endpoint or os.environ.get("GOOGLE_BASE_URL")
    if endpoint is not None:
        options["base_url"] = endpoint.rstrip("/")
    return opened(
        config,
        lambda retries: GCSStore(
            uri.authority,
            config=options,  # type: ignore[arg-type]
            client_options=client_options(config, allow_http=(endpoint or "").startswith("http://")),
            retry_config=retries,
        ),
    )
