"""Config classes of the backends, without secrets.

They have the keys of ``[storage.s3]`` and its siblings.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from attrs import field, frozen
from attrs.validators import ge, gt, le, lt

from wmtp.plugins.contract import StorageBackendConfig
from wmtp_storage.uris import parse

if TYPE_CHECKING:
    from wmtp.storage import Storage

__all__ = ["AzureStorage", "GoogleStorage", "HTTPStorage", "RemoteStorage", "S3Storage"]

_Config = TypeVar("_Config", bound=type)


def _with_shared_keys(cls: _Config) -> _Config:
    """Add the keys that all backends have to the docstring.

    ``wmtp show`` and the reference find them there.
    """
    shared = inspect.cleandoc(RemoteStorage.__doc__ or "").partition("\nArgs:\n")[2]
    own = inspect.cleandoc(cls.__doc__ or "").rstrip()
    cls.__doc__ = f"{own}\n{shared}" if "\nArgs:\n" in own else f"{own}\n\nArgs:\n{shared}"
    return cls


@frozen(kw_only=True)
class RemoteStorage(StorageBackendConfig):
    """Keys common to every backend of this package.

    Args:
        max_connections: upper limit of parallel requests; their number follows the throughput.
        chunk_size: upper limit of one request, in MB.
        max_memory: upper limit of file contents held in memory, in MB. The process itself needs less than 128 MB beside it.
        retry_timeout: seconds for which a request that fails on its way, or that a busy server refuses, is sent again, with
            growing pauses; received bytes restart the time. 0: never again.
        connect_timeout: seconds to reach the server.
        read_timeout: seconds without a single byte after which a request is started again.
        proxy: the address of an HTTP proxy. Default: that of ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY``.
        ca_bundle: a PEM file with certificates to trust besides the system's. Default: that of ``AWS_CA_BUNDLE``,
            ``REQUESTS_CA_BUNDLE`` or ``SSL_CERT_FILE``.
    """

    former_keys: ClassVar[Mapping[str, str]] = {"max_retries": "requests are tried again by time; write retry_timeout"}
    max_connections: int = field(default=64, validator=ge(1))
    chunk_size: float = field(default=32.0, validator=[gt(0.0), lt(math.inf)])
    max_memory: int = field(default=128, validator=ge(16))
    retry_timeout: float = field(default=300.0, validator=[ge(0.0), le(1e9)])
    connect_timeout: float = field(default=10.0, validator=[gt(0.0), le(1e9)])
    read_timeout: float = field(default=30.0, validator=[gt(0.0), le(1e9)])
    proxy: str | None = None
    ca_bundle: str | None = None

    @staticmethod
    def check_uri(uri: str) -> None:
        """See `wmtp.plugins.hookspecs.wmtp_storages`."""
        parse(uri)

    def check(self) -> Iterable[str]:
        """Report contradictions between keys."""
        endpoint = getattr(self, "endpoint", None)
        for key, address in (("endpoint", endpoint), ("proxy", self.proxy)):
            if address is not None and (urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname):
                yield f"{key}: {address!r} is no address; write https://HOST or http://HOST:PORT"


@_with_shared_keys
@frozen(kw_only=True)
class S3Storage(RemoteStorage):
    """Amazon S3 and what speaks its protocol: ``s3://BUCKET/KEY``.

    Credentials: ``AWS_ACCESS_KEY_ID`` and its siblings, the shared credentials and config files (``AWS_PROFILE``), web
    identity, single sign-on, container and instance metadata, as botocore finds them.

    Args:
        endpoint: the address of another server than Amazon's. Default: ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, or
            ``endpoint_url`` of the profile.
        region: default: the bucket is asked where it is.
        profile: of the shared files. Default: ``AWS_PROFILE``.
        anonymous: send no credentials: for public buckets.
        acceleration: through S3 Transfer Acceleration, which the bucket must have enabled.
        requester_pays: agree to pay for the transfer from a bucket whose owner does not.
        md5_etags: whether an ETag that looks like an MD5 is one, as on Amazon's servers for all but encrypted objects.
        addressing: ``virtual`` puts the bucket into the host's name, ``path`` into the path. ``auto``: virtual on Amazon's
            servers where the bucket's name allows it, else path.
    """

    type = "s3"
    schemes: ClassVar[tuple[str, ...]] = ("s3",)
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    acceleration: bool = False
    requester_pays: bool = False
    md5_etags: bool = True
    addressing: Literal["auto", "virtual", "path"] = "auto"

    def check(self) -> Iterable[str]:
        """See `RemoteStorage.check`."""
        yield from super().check()
        if self.acceleration and self.endpoint is not None:
            yield "acceleration: uses a host of Amazon's; remove endpoint, or acceleration"
        if self.acceleration and self.addressing == "path":
            yield "acceleration: has the bucket in the host's name; remove addressing, or acceleration"

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp_storage.backend import ObjectStorage
        from wmtp_storage.s3 import open_s3

        return ObjectStorage(self, open_s3)


@_with_shared_keys
@frozen(kw_only=True)
class GoogleStorage(RemoteStorage):
    """Google Cloud Storage: ``gs://BUCKET/KEY``.

    Credentials: ``GOOGLE_APPLICATION_CREDENTIALS``, ``GOOGLE_SERVICE_ACCOUNT``, those of ``gcloud auth application-default
    login``, or the instance's metadata.

    Args:
        endpoint: the address of another server than Google's. Default: ``GOOGLE_BASE_URL``.
        anonymous: send no credentials: for public buckets.
    """

    type = "gs"
    schemes: ClassVar[tuple[str, ...]] = ("gs",)
    endpoint: str | None = None
    anonymous: bool = False

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp_storage.backend import ObjectStorage
        from wmtp_storage.gs import open_gs

        return ObjectStorage(self, open_gs)


@_with_shared_keys
@frozen(kw_only=True)
class AzureStorage(RemoteStorage):
    """Azure Blob Storage: ``az://CONTAINER/BLOB``, or ``abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/BLOB``.

    Credentials: ``AZURE_STORAGE_ACCOUNT_KEY``, ``AZURE_STORAGE_SAS_TOKEN``, ``AZURE_CLIENT_ID`` with its siblings, workload
    identity, the machine's managed identity, or those of ``az login`` where ``use_azure_cli`` says so.

    Args:
        account: the storage account. Default: ``AZURE_STORAGE_ACCOUNT_NAME``.
        endpoint: the address of another server than Azure's, with the account in its path where the server wants it so.
        anonymous: send no credentials: for public containers.
        use_azure_cli: ask the program ``az`` for a token.
    """

    type = "az"
    schemes: ClassVar[tuple[str, ...]] = ("az", "abfs", "abfss")
    account: str | None = None
    endpoint: str | None = None
    anonymous: bool = False
    use_azure_cli: bool = False

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp_storage.azure import open_azure
        from wmtp_storage.backend import ObjectStorage

        return ObjectStorage(self, open_azure)


@_with_shared_keys
@frozen(kw_only=True)
class HTTPStorage(RemoteStorage):
    """Web servers: ``https://HOST/PATH``. Credentials: ``~/.netrc``, or a signature in the URL itself.

    A folder is read where the server lists it (WebDAV), or where it holds a ``.wmtp-manifest.json``, as fetched folders do.
    """

    type = "http"
    schemes: ClassVar[tuple[str, ...]] = ("http", "https")

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp_storage.backend import ObjectStorage
        from wmtp_storage.web import open_http

        return ObjectStorage(self, open_http)
