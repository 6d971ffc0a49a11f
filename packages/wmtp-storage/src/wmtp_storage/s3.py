"""S3: which host serves a bucket, where it is, and who asks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from obstore.store import S3Store

from wmtp.errors import ConfigError
from wmtp_storage.checksums import StoreChecksum, etag_md5
from wmtp_storage.client import Opened, client_options, opened
from wmtp_storage.s3_credentials import Credentials, endpoint_and_region

if TYPE_CHECKING:
    from obstore.store import RetryConfig

    from wmtp_storage.backend import StoredObject
    from wmtp_storage.config import S3Storage
    from wmtp_storage.leftovers import Unfinished
    from wmtp_storage.s3_listing import S3Listing
    from wmtp_storage.s3_requests import S3Requests
    from wmtp_storage.uris import RemoteURI

__all__ = ["open_s3"]

logger = logging.getLogger("wmtp.storage")

#: smaller objects are compared with the MD5 that their ETag is, without another request
_SMALL = 8 * 2**20


def open_s3(config: S3Storage, uri: RemoteURI) -> Opened:
    """Open a bucket.

    Raises:
        ConfigError: the profile does not exist, or acceleration is not possible for this bucket.
        WMTPError: there are no credentials.
    """
    bucket = uri.authority
    endpoint, region = endpoint_and_region(config)
    if endpoint is None and config.region is None:
        region = _find_region(config, bucket, region or "us-east-1")
    region = region or "us-east-1"
    address, is_virtual = _address(config, bucket, endpoint, region)
    credentials = None if config.anonymous else Credentials(config)
    options: dict[str, Any] = {
        "aws_endpoint_url_s3": address,  # obstore lets the variable of this name win over "endpoint"
        "virtual_hosted_style_request": is_virtual,
        "region": region,
        "skip_signature": config.anonymous,
    }
    if config.requester_pays:
        options["request_payer"] = True

    def store(retries: RetryConfig) -> S3Store:
        return S3Store(
            bucket,
            config=options,  # type: ignore[arg-type]
            client_options=client_options(config, allow_http=address.startswith("http://")),
            retry_config=retries,
            credential_provider=credentials,
        )

    @functools.cache
    def requests() -> S3Requests:
        from wmtp_storage.s3_requests import S3Requests

        return S3Requests(
            config,
            address=address if is_virtual else f"{address}/{quote(bucket)}",
            service=endpoint or _service(region),
            region=region,
            credentials=credentials,
        )

    def unfinished(prefix: str) -> Sequence[Unfinished]:
        from wmtp_storage.s3_uploads import unfinished_uploads

        return unfinished_uploads(requests(), prefix)

    def abort(uploads: Iterable[Unfinished]) -> None:
        from wmtp_storage.s3_uploads import abort_uploads

        abort_uploads(requests(), uploads)

    def listing() -> S3Listing:
        from wmtp_storage.s3_listing import S3Listing

        return S3Listing(requests(), bucket)

    return opened(
        config,
        store,
        pages=lambda prefix: listing().pages(prefix),
        names=lambda prefix: listing().names(prefix),
        copy=lambda source, target: requests().copy(bucket, source, target),
        checksum=lambda stored, did_not_match: requests().checksum(stored, did_not_match),
        listed_checksum=partial(_listed_checksum, config),
        unfinished=unfinished,
        abort=abort,
        buckets=lambda: requests().buckets(),
    )


def _listed_checksum(config: S3Storage, stored: StoredObject) -> StoreChecksum | None:
    """Read a small object's MD5 from its ETag; None without one.

    None also where S3 may have a cheaper checksum.
    """
    found = etag_md5(stored.etag)
    if config.md5_etags and stored.size <= _SMALL and found is not None and found[1] is None:
        return StoreChecksum("md5", found[0])
    return None


def _address(config: S3Storage, bucket: str, endpoint: str | None, region: str) -> tuple[str, bool]:
    """Return the address, and whether it has the bucket in its host."""
    if config.acceleration:
        if endpoint is not None:
            raise ConfigError(f"acceleration: uses a host of Amazon's, but the environment names the endpoint {endpoint}")
        if "." in bucket:
            raise ConfigError(f"acceleration: Amazon does not serve the bucket {bucket!r} so, for the dot in its name")
        return f"https://{bucket}.s3-accelerate.amazonaws.com", True
    is_virtual = config.addressing == "virtual"
    if endpoint is None:
        # with a dot in it, the bucket's host would not match Amazon's certificate
        is_virtual |= config.addressing == "auto" and "." not in bucket
        endpoint = _service(region)
    if not is_virtual:
        return endpoint.rstrip("/"), False
    parts = urlsplit(endpoint)
    host = parts.netloc if parts.netloc.startswith(f"{bucket}.") else f"{bucket}.{parts.netloc}"
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", "")), True


def _service(region: str) -> str:
    """Return the address of Amazon's S3."""
    return f"https://s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"


def _find_region(config: S3Storage, bucket: str, guess: str) -> str:
    """Ask Amazon where a bucket is.

    It tells anybody, even where it refuses; where it cannot be reached, the guess stands.
    """
    from botocore.awsrequest import AWSRequest
    from botocore.exceptions import BotoCoreError

    from wmtp_storage.s3_requests import http_session

    url = f"{_service(guess)}/{quote(bucket)}"
    try:
        answer = http_session(config, url).send(AWSRequest("HEAD", url).prepare())
    except BotoCoreError as error:
        logger.debug("%s could not be asked where the bucket %s is (%s); taking %s", url, bucket, error, guess)
        return guess
    return answer.headers.get("x-amz-bucket-region", guess)
