"""Azure Blob Storage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from obstore.store import AzureStore

from wmtp.errors import ConfigError
from wmtp_storage.client import Opened, client_options, opened

if TYPE_CHECKING:
    from wmtp_storage.config import AzureStorage
    from wmtp_storage.uris import RemoteURI

__all__ = ["open_azure"]


def open_azure(config: AzureStorage, uri: RemoteURI) -> Opened:
    """Open a container. obstore itself looks for credentials in Azure's standard places.

    Raises:
        ConfigError: no storage account is named.
    """
    container, _, host = uri.authority.partition("@")
    account = host.partition(".")[0] or config.account or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise ConfigError(f"{uri}: which storage account? set storage.az.account, or AZURE_STORAGE_ACCOUNT_NAME")
    options: dict[str, Any] = {"account_name": account}
    if config.anonymous:
        options["skip_signature"] = True
    if config.use_azure_cli:
        options["use_azure_cli"] = True
    endpoint = config.endpoint
    if endpoint is not None:
        options["endpoint"] = endpoint.rstrip("/")
    return opened(
        config,
        lambda retries: AzureStore(
            container,
            config=options,  # type: ignore[arg-type]
            client_options=client_options(config, allow_http=(endpoint or "").startswith("http://")),
            retry_config=retries,
        ),
    )
