"""Requests to S3 that obstore lacks: checksums, above all."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit
from xml.etree import ElementTree

from attrs import Factory, field, frozen
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.credentials import Credentials as BotoCredentials
from botocore.exceptions import BotoCoreError, ConnectionClosedError
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies
from obstore.exceptions import GenericError

from wmtp.errors import WMTPError
from wmtp_storage.checksums import StoreChecksum, etag_md5, from_headers
from wmtp_storage.client import ca_bundle
from wmtp_storage.retrying import Retries, is_transient, with_retries
from wmtp_storage.s3_responses import parsed

if TYPE_CHECKING:
    from wmtp_storage.backend import StoredObject
    from wmtp_storage.config import S3Storage
    from wmtp_storage.s3_credentials import Credentials

__all__ = ["S3Requests", "http_session"]

logger = logging.getLogger("wmtp.storage")

#: HTTP statuses below 500 after which the same request may succeed
_BUSY = (408, 425, 429)


def http_session(config: S3Storage, url: str) -> URLLib3Session:
    """Open a connection for single requests, with the common proxy and certificates."""
    bundle = ca_bundle(config)
    proxies = {"http": config.proxy, "https": config.proxy} if config.proxy else get_environ_proxies(url)
    verify: Any = str(bundle) if bundle else True
    return URLLib3Session(verify=verify, proxies=proxies, timeout=(config.connect_timeout, config.read_timeout))


@frozen
class S3Requests:
    """Asks what obstore does not: for the checksums of objects, for instance.

    Args:
        config: of the backend.
        address: of the bucket.
        service: the address of the server, without a bucket.
        region: of the bucket.
        credentials: None to ask anonymously.
    """

    config: S3Storage
    address: str
    service: str
    region: str
    credentials: Credentials | None
    _session: URLLib3Session = field(
        init=False, default=Factory(lambda self: http_session(self.config, self.address), takes_self=True)
    )

    def checksum(self, stored: StoredObject, did_not_match: bool = False) -> StoreChecksum | None:
        """Ask S3 for the checksum of an object.

        None where none can be computed here.

        Args:
            stored: the object.
            did_not_match: the previous answer did not match: look more closely.
        """
        try:
            headers = self._head(stored)
            parts = _part_count(headers)
            sizes = None
            if parts is not None:
                sizes = self._exact_sizes(stored, parts) if did_not_match else self._part_sizes(stored, parts)
        except BotoCoreError as error:
            raise WMTPError(f"{stored.key}: its checksum could not be asked for: {error}") from error
        if not self.config.md5_etags:
            headers = {name: value for name, value in headers.items() if name != "etag"}
        return from_headers(headers, sizes)

    def buckets(self) -> list[str]:
        """List the caller's buckets; empty where that is not permitted."""
        try:
            answer = self.send("GET", f"{self.service.rstrip('/')}/")
            if answer.status_code != 200:
                return []
            return [name.text or "" for name in ElementTree.fromstring(answer.content).iterfind("{*}Buckets/{*}Bucket/{*}Name")]
        except (BotoCoreError, ElementTree.ParseError) as error:
            logger.debug("the buckets could not be asked for: %s", error)
            return []

    def copy(self, bucket: str, source: str, target: str) -> None:
        """Copy an object inside the bucket, and read the answer.

        obstore takes any answer for a success.

        Raises:
            WrongAnswerError: something else than the store answered.
            GenericError: the store refused, or could not be reached.
        """
        url, headers = f"{self.address}/{quote(target)}", {"x-amz-copy-source": quote(f"/{bucket}/{source}")}
        try:
            self.ask("PUT", url, "CopyObjectResult", headers)
        except BotoCoreError as error:
            raise GenericError(str(error)) from error

    def ask(self, method: str, url: str, root: str, headers: Mapping[str, str] | None = None) -> ElementTree.Element:
        """Send a request whose answer is XML, with retries.

        As `send`; also once more where the answer broke off, or says to.

        Raises:
            BotoCoreError: the server could not be reached.
            GenericError: the store refused, or its answers break off.
            WrongAnswerError: something else than the store answered.
        """
        return with_retries(self.config.retry_timeout, _shown(url), lambda: parsed(self._once(method, url, headers), root))

    def send(self, method: str, url: str, headers: Mapping[str, str] | None = None) -> AWSResponse:
        """Send a signed request without a body, with retries.

        Again, with backoff and jitter, where the server is busy or cannot be reached.

        Raises:
            BotoCoreError: the server could not be reached.
        """
        retries = Retries(self.config.retry_timeout, _shown(url))
        while True:
            try:
                answer = self._once(method, url, headers)
                if answer.status_code not in _BUSY and answer.status_code < 500:
                    return answer
                if (pause := retries.pause(GenericError(f"HTTP status {answer.status_code}"))) is None:
                    return answer
            except BotoCoreError as error:
                if not is_transient(error) or (pause := retries.pause(error)) is None:
                    raise
            time.sleep(pause)

    def _once(self, method: str, url: str, headers: Mapping[str, str] | None) -> AWSResponse:
        parts = urlsplit(url)
        url = urlunsplit(parts._replace(path=parts.path or "/"))  # the signature needs a path, and so does the request
        request = AWSRequest(method, url, headers=dict(headers or {}))
        if self.config.requester_pays:
            request.headers["x-amz-request-payer"] = "requester"
        if self.credentials is not None:
            S3SigV4Auth(_for_botocore(self.credentials), "s3", self.region).add_auth(request)
        answer = self._session.send(request.prepare())
        if (lost := _lost(method, answer)) is not None:
            raise ConnectionClosedError(endpoint_url=_shown(url), error=lost)
        return answer

    def _part_sizes(self, stored: StoredObject, parts: int) -> list[int] | None:
        """Return the sizes of parts, all but the last of one size.

        So they are in what every known tool uploads; else each part is asked for.
        """
        first = int(self._head(stored, part=1).get("content-length", 0))
        if not first or -(-stored.size // first) != parts:
            return self._exact_sizes(stored, parts)
        return [first] * (parts - 1) + [stored.size - first * (parts - 1)]

    def _exact_sizes(self, stored: StoredObject, parts: int) -> list[int] | None:
        sizes = [int(self._head(stored, part=number).get("content-length", 0)) for number in range(1, parts + 1)]
        return sizes if sum(sizes) == stored.size else None

    def _head(self, stored: StoredObject, part: int | None = None) -> Mapping[str, str]:
        url = f"{self.address}/{quote(stored.key)}" + (f"?partNumber={part}" if part is not None else "")
        headers: dict[str, Any] = {"x-amz-checksum-mode": "ENABLED"}
        if stored.etag is not None:
            headers["If-Match"] = stored.etag
        answer = self.send("HEAD", url, headers)
        if answer.status_code == 429 or answer.status_code >= 500:
            raise WMTPError(f"{stored.key}: its checksum could not be asked for: HTTP status {answer.status_code}")
        if answer.status_code in (400, 401, 403) and part is None:
            raise WMTPError(
                f"{stored.key}: its checksum could not be asked for: HTTP status {answer.status_code}: permission denied, or"
                " the credentials have expired. What came is kept: run it again to continue"
            )
        if not 200 <= answer.status_code < 300:
            logger.debug("%s: asked for its checksum, the server answered %s", stored.key, answer.status_code)
            return {}
        return {name.lower(): value for name, value in answer.headers.items()}


def _lost(method: str, answer: AWSResponse) -> str | None:
    """Say what is missing of an answer.

    To botocore the end of a connection ends headers and body.
    """
    headers = {name.lower(): value for name, value in answer.headers.items()}
    length = headers.get("content-length", "")
    if method == "HEAD":
        is_cut = answer.status_code == 200 and not (length and "etag" in headers)
        return "the answer broke off within its headers" if is_cut else None
    if length.isdecimal() and len(answer.content) < int(length):
        return f"the answer broke off after {len(answer.content)} of {length} bytes"
    if answer.status_code == 200 and not (length or answer.content or "transfer-encoding" in headers):
        return "the answer broke off within its headers"
    return None


def _shown(url: str) -> str:
    """Shorten an address for messages: a query may be long, or secret."""
    return url.partition("?")[0]


def _part_count(headers: Mapping[str, str]) -> int | None:
    """Return an object's number of parts; None for a whole upload."""
    found = etag_md5(headers.get("etag"))
    if found is not None and found[1] is not None:
        return found[1]
    counts = [value.partition("-")[2] for name, value in headers.items() if name.startswith("x-amz-checksum-")]
    return next((int(count) for count in counts if count.isdigit()), None)


def _for_botocore(credentials: Credentials) -> BotoCredentials:
    found = credentials()
    return BotoCredentials(found["access_key_id"], found["secret_access_key"], found.get("token"))
