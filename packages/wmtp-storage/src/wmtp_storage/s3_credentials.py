"""Credentials and region of S3, as the AWS tools find them.

botocore takes a tenth of a second to import: it is imported where it is needed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.errors import ConfigError, WMTPError

if TYPE_CHECKING:
    from botocore.session import Session
    from obstore.store import S3Credential

    from wmtp_storage.config import S3Storage

__all__ = ["Credentials", "aws_session", "endpoint_and_region"]

#: credentials are asked for again after so long: files may be rewritten, and sessions renewed, while a transfer runs
_CREDENTIALS_AGE = timedelta(minutes=5)
#: what makes the AWS tools look for more than keys in the environment
_MORE = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CREDENTIAL_EXPIRATION", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}


def is_in_environment(config: S3Storage) -> bool:
    """Return True if the environment alone configures access, without other AWS sources."""
    found: Mapping[str, str] = os.environ
    if config.profile is not None or any(name in found for name in _MORE):
        return False
    if not (found.get("AWS_ACCESS_KEY_ID") and found.get("AWS_SECRET_ACCESS_KEY")):
        return False
    return not any(Path(found.get(name, usual)).expanduser().is_file() for name, usual in _FILES.items())


def endpoint_and_region(config: S3Storage) -> tuple[str | None, str | None]:
    """Resolve endpoint and region as AWS tools do.

    From options, environment and shared files.

    Raises:
        ConfigError: the profile does not exist.
    """
    region = config.region or os.environ.get("AWS_REGION")
    if is_in_environment(config):
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        endpoint = config.endpoint or next((os.environ[name] for name in names if os.environ.get(name)), None)
        return endpoint, region or os.environ.get("AWS_DEFAULT_REGION")
    session = aws_session(config)
    return config.endpoint or _configured_endpoint(session), region or session.get_config_variable("region")


def _configured_endpoint(session: Session) -> str | None:
    from botocore.configprovider import ConfiguredEndpointProvider

    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    provider = ConfiguredEndpointProvider(
        full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
    )
    return provider.provide() or os.environ.get("AWS_ENDPOINT")


def aws_session(config: S3Storage) -> Session:
    """Open the AWS tools' configuration.

    Raises:
        ConfigError: the profile does not exist, or the shared files are damaged.
    """
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    session = Session(profile=config.profile)
    profile = session.profile
    try:
        profiles = session.available_profiles
    except BotoCoreError as error:  # a file that is no INI file
        raise ConfigError(f"the shared AWS files cannot be read: {' '.join(str(error).split())}") from error
    if profile is not None and profile not in profiles:
        where = f"profile: {profile!r}" if config.profile else f"AWS_PROFILE: {profile!r}"
        raise ConfigError(f"{where} is in none of the shared AWS files; profiles there: {', '.join(profiles) or 'none'}")
    return session


class Credentials:
    """Credential provider for obstore, by botocore.

    It finds and renews credentials as the AWS tools do.

    Args:
        config: of the backend.
    """

    def __init__(self, config: S3Storage) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._found: Any = None
        self._given: S3Credential | None = None
        self._given_until = 0.0
        self()  # missing credentials are reported before any work is done

    def __call__(self) -> S3Credential:
        """Return credentials, and when to ask for them again."""
        with self._lock:
            if self._given is not None and time.monotonic() < self._given_until:
                return self._given  # to look for them costs more than a request does
            keys = self._environment() if is_in_environment(self._config) else self._look()
            if keys is None or keys[0] is None:
                raise WMTPError(
                    "no credentials for S3: neither the environment (AWS_ACCESS_KEY_ID), nor the shared AWS files, nor the"
                    " metadata of a container or instance has any; for a public bucket set storage.s3.anonymous = true"
                )
            now = datetime.now(UTC)
            ends = getattr(self._found, "_expiry_time", None) or now + _CREDENTIALS_AGE  # botocore has no other name for it
            age = max(timedelta(0), min(_CREDENTIALS_AGE, ends - now))
            self._given_until = time.monotonic() + age.total_seconds() / 2
            self._given = {
                "access_key_id": keys[0],
                "secret_access_key": keys[1],
                "token": keys[2],
                "expires_at": now + age,
            }
            return self._given

    def _environment(self) -> tuple[str, str, str | None]:
        token = os.environ.get("AWS_SESSION_TOKEN") or os.environ.get("AWS_SECURITY_TOKEN")
        return os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"], token or None

    def _look(self) -> tuple[str, str, str | None] | None:
        from botocore.credentials import RefreshableCredentials
        from botocore.exceptions import SSOError

        try:
            # those of files and the environment are read anew, those with a life of their own renew themselves
            if not isinstance(self._found, RefreshableCredentials):
                self._found = aws_session(self._config).get_credentials()
            return None if self._found is None else tuple(self._found.get_frozen_credentials())[:3]
        except WMTPError:
            raise
        except Exception as error:  # a service that refuses, a program that fails, a file that is gone, no JSON
            said = " ".join(str(error).split()) or type(error).__name__
            hint = "; log in with: aws sso login" if isinstance(error, SSOError) and "aws sso login" not in said else ""
            raise WMTPError(f"no credentials for S3: {said}{hint}") from error
