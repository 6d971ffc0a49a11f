"""Web servers."""

from __future__ import annotations

import netrc
from base64 import b64encode
from typing import TYPE_CHECKING

from obstore.store import HTTPStore

from wmtp.errors import ConfigError
from wmtp_storage.client import Opened, client_options, opened

if TYPE_CHECKING:
    from wmtp_storage.config import HTTPStorage
    from wmtp_storage.uris import RemoteURI

__all__ = ["open_http"]


def open_http(config: HTTPStorage, uri: RemoteURI) -> Opened:
    """Open a host.

    A query, which may be a signature, goes along with every request.
    """
    query = f"?{uri.query}" if uri.query else ""
    return opened(
        config,
        lambda retries: HTTPStore(
            f"{uri.scheme}://{uri.authority}/{query}",
            client_options=client_options(config, allow_http=uri.scheme == "http", headers=_login(uri.authority)),
            retry_config=retries,
        ),
    )


def _login(authority: str) -> dict[str, str]:
    """Read the host's login from ``~/.netrc``."""
    host = authority.rpartition(":")[0] or authority
    try:
        found = netrc.netrc().authenticators(host)
    except FileNotFoundError:
        return {}
    except (netrc.NetrcParseError, OSError) as error:
        raise ConfigError(f"~/.netrc cannot be read: {error}") from error
    if found is None:
        return {}
    login, _, password = found
    return {"Authorization": f"Basic {b64encode(f'{login}:{password}'.encode()).decode()}"}
