"""Credentials of VESSL, from where its own client has them.

These are the same variables and the same file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import tomli
from attrs import field, frozen

from wmtp.errors import AuthenticationError, ConfigError

__all__ = ["Credentials", "host"]

DEFAULT_HOST: Final = "https://api.vessl.ai"
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


@frozen(kw_only=True)
class Credentials:
    """Credentials of a request.

    Args:
        host: of the API, without a slash at the end.
        token: secret.
        organization: its name.
        project: its name.
    """

    host: str
    token: str = field(repr=False)
    organization: str
    project: str

    @classmethod
    def find(cls, organization: str | None, project: str | None) -> Credentials:
        """Find them in the environment, then in ``~/.vessl/config``.

        Args:
            organization: what the config says, which goes before.
            project: the same.

        Raises:
            AuthenticationError: there is no token.
            ConfigError: organization or project are not known.
        """
        environment, user = os.environ, _user_settings()
        token = environment.get("VESSL_ACCESS_TOKEN") or user.get("access_token")
        if not token:
            raise AuthenticationError(
                f"no VESSL token: set VESSL_ACCESS_TOKEN, or run 'vessl configure' (pip install vessl), which writes {_file()}"
            )
        organization = organization or environment.get("VESSL_DEFAULT_ORGANIZATION") or user.get("default_organization")
        project = project or environment.get("VESSL_DEFAULT_PROJECT") or user.get("default_project")
        missing = [
            f"launcher.{key}: not set; write it, or set {variable}"
            for key, value, variable in (
                ("organization", organization, "VESSL_DEFAULT_ORGANIZATION"),
                ("project", project, "VESSL_DEFAULT_PROJECT"),
            )
            if not value
        ]
        if missing or not organization or not project:
            raise ConfigError(missing)
        return cls(host=host(), token=str(token).strip(), organization=organization, project=project)


def host() -> str:
    """Return the API's address.

    Raises:
        ConfigError: the token would travel unencrypted.
    """
    address = (os.environ.get("VESSL_API_HOST") or DEFAULT_HOST).rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"VESSL_API_HOST: {address!r} is no address; write {DEFAULT_HOST}")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise ConfigError(f"VESSL_API_HOST: {address!r} would send the token unencrypted; write https://{parts.netloc}")
    return address


def _file() -> Path:
    named = os.environ.get("VESSL_CREDENTIALS_FILE") or os.environ.get("VESSL_CONFIG_PATH")
    return Path(named or "~/.vessl/config").expanduser()


def _user_settings() -> Mapping[str, Any]:
    """Read the table ``[user]`` of VESSL's file; empty without one.

    ``vessl configure`` writes it.
    """
    path = _file()
    try:
        settings = tomli.loads(path.read_text(encoding="utf-8")).get("user", {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise AuthenticationError(f"{path} cannot be read: {error}; run 'vessl configure' again") from None
    return settings if isinstance(settings, Mapping) else {}
