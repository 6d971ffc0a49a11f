"""S3: which host serves a bucket, where it is, and who asks."""

from __future__ import annotations

import logging
import os
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from botocore.configprovider import ConfiguredEndpointProvider
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import BotoCoreError
from botocore.httpsession import URLLib3Session
from botocore.session import Session
from botocore.utils import get_environ_proxies
from obstore.store import S3Store

from wmtp.errors import ConfigError, WMTPError
from wmtp_storage.client import ca_bundle, client_options, retry_config

if TYPE_CHECKING:
    from obstore.store import S3Credential

    from wmtp_storage.config import S3Storage
    from wmtp_storage.uris import RemoteURI

__all__ = ["s3_store"]

logger = logging.getLogger("wmtp.storage")

#: credentials are asked for again after so long: files may be rewritten, and sessions renewed, while a transfer runs
_CREDENTIALS_AGE = timedelta(minutes=5)


def s3_store(config: S3Storage, uri: RemoteURI) -> S3Store:
    """The store of a bucket.

    Raises:
        ConfigError: the profile does not exist, or acceleration is not possible for this bucket.
        WMTPError: there are no credentials.
    """
    bucket = uri.authority
    session = _session(config)
    endpoint = config.endpoint or _configured_endpoint(session)
    region = config.region or os.environ.get("AWS_REGION") or session.get_config_variable("region")
    if endpoint is None and config.region is None:
        region = _find_region(config, bucket, region or "us-east-1")
    address, is_virtual = _address(config, bucket, endpoint, region or "us-east-1")
    options: dict[str, Any] = {
        "endpoint": address,
        "virtual_hosted_style_request": is_virtual,
        "region": region or "us-east-1",
        "skip_signature": config.anonymous,
    }
    if config.requester_pays:
        options["request_payer"] = True
    return S3Store(
        bucket,
        config=options,  # type: ignore[arg-type]
        client_options=client_options(config, allow_http=address.startswith("http://")),
        retry_config=retry_config(config),
        credential_provider=None if config.anonymous else _Credentials(config),
    )


def _session(config: S3Storage) -> Session:
    session = Session(profile=config.profile)
    profile = session.profile
    if profile is not None and profile not in session.available_profiles:
        where = f"profile: {profile!r}" if config.profile else f"AWS_PROFILE: {profile!r}"
        known = ", ".join(session.available_profiles) or "none"
        raise ConfigError(f"{where} is in none of the shared AWS files; profiles there: {known}")
    return session


def _configured_endpoint(session: Session) -> str | None:
    """What the environment and the shared files say, with the AWS tools' precedence."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    provider = ConfiguredEndpointProvider(
        full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
    )
    return provider.provide() or os.environ.get("AWS_ENDPOINT")


def _address(config: S3Storage, bucket: str, endpoint: str | None, region: str) -> tuple[str, bool]:
    """The address to send requests to, and whether the bucket is part of the host's name."""
    if config.acceleration:
        if endpoint is not None:
            raise ConfigError(f"acceleration: is a host of Amazon's, but the environment names the endpoint {endpoint}")
        if "." in bucket:
            raise ConfigError(f"acceleration: Amazon does not serve the bucket {bucket!r} so, for the dot in its name")
        return f"https://{bucket}.s3-accelerate.amazonaws.com", True
    is_virtual = config.addressing == "virtual"
    if endpoint is None:
        # with a dot in it, the bucket's host would not match Amazon's certificate
        is_virtual |= config.addressing == "auto" and "." not in bucket
        endpoint = f"https://s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"
    if not is_virtual:
        return endpoint.rstrip("/"), False
    parts = urlsplit(endpoint)
    host = parts.netloc if parts.netloc.startswith(f"{bucket}.") else f"{bucket}.{parts.netloc}"
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", "")), True


def _find_region(config: S3Storage, bucket: str, guess: str) -> str:
    """Ask where a bucket is. Amazon tells anybody, even where it refuses; where it cannot be reached, the guess stands."""
    from botocore.awsrequest import AWSRequest

    url = f"https://s3.{guess}.amazonaws.com{'.cn' if guess.startswith('cn-') else ''}/{quote(bucket)}"
    bundle = ca_bundle(config)
    proxies = {"https": config.proxy} if config.proxy else get_environ_proxies(url)
    try:
        client = URLLib3Session(verify=str(bundle) if bundle else True, proxies=proxies, timeout=config.connect_timeout)
        answer = client.send(AWSRequest("HEAD", url).prepare())
    except BotoCoreError as error:
        logger.debug("%s could not be asked where the bucket %s is (%s); taking %s", url, bucket, error, guess)
        return guess
    return answer.headers.get("x-amz-bucket-region", guess)


class _Credentials:
    """Asks botocore for credentials, in obstore's form. It finds and renews them as the AWS tools do.

    Args:
        config: of the backend.
    """

    def __init__(self, config: S3Storage) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._found: Any = None
        self()  # what is missing is said before any work is done

    def __call__(self) -> S3Credential:
        """Credentials, and when to ask for them again."""
        with self._lock:
            try:
                # those of files and the environment are read anew, those with a life of their own renew themselves
                if not isinstance(self._found, RefreshableCredentials):
                    self._found = _session(self._config).get_credentials()
                frozen = None if self._found is None else self._found.get_frozen_credentials()
            except BotoCoreError as error:
                raise WMTPError(f"no credentials for S3: {error}") from error
        if frozen is None or frozen.access_key is None:
            raise WMTPError(
                "no credentials for S3: neither the environment (AWS_ACCESS_KEY_ID), nor the shared AWS files, nor the metadata"
                " of a container or instance has any; for a public bucket set storage.s3.anonymous = true"
            )
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_AGE,
        }
