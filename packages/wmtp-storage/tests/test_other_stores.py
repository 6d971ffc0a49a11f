"""Azure's and Google's protocols, spoken by the emulators that their users have.

They are ``azurite-blob`` (npm: azurite) and ``fake-gcs-server``. Where one is not installed, its tests are skipped.
"""

import base64
import hashlib
import hmac
import http.client
import itertools
import json
import shutil
import socket
import subprocess
import time
from datetime import UTC, datetime
from urllib.parse import quote

import pytest
from small_server import free_port

from wmtp.errors import WMTPError
from wmtp.storage.manifest import MANIFEST, Manifest
from wmtp.testing import StorageTests
from wmtp_storage import AzureStorage, GoogleStorage

#: of the account that every Azurite has; it is in its documentation
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

_numbers = itertools.count()


def start(program, *words):
    """A server on a free port, which stands for ``PORT`` in ``words``; its process and its port."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    port = free_port()
    command = [found, *(word.replace("PORT", str(port)) for word in words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process, port
        except OSError:
            assert process.poll() is None, f"{program} has ended"
            time.sleep(0.05)
    raise AssertionError(f"{program} did not start")


def ask(port, method, path, body=b"", headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status < 300, content
    return content


@pytest.fixture(scope="module")
def azurite():
    process, port = start("azurite-blob", "--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--blobPort", "PORT")
    yield port
    process.kill()


@pytest.fixture
def container(azurite, monkeypatch):
    """A new container; the environment says who asks, and for the suite's sake also where."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    name = f"test-{next(_numbers)}"
    facts = {"x-ms-date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"), "x-ms-version": "2021-08-06"}
    path = f"/{ACCOUNT}/{name}"
    lines = ["PUT", *[""] * 11, *(f"{key}:{value}" for key, value in facts.items()), f"/{ACCOUNT}{path}", "restype:container"]
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), "\n".join(lines).encode(), hashlib.sha256).digest()).decode()
    ask(azurite, "PUT", f"{path}?restype=container", headers=facts | {"Authorization": f"SharedKey {ACCOUNT}:{signature}"})
    return f"az://{name}"


class TestAzureStorage(StorageTests):
    config = AzureStorage(account=ACCOUNT)

    @pytest.fixture
    def storage(self, azurite):
        return AzureStorage(account=ACCOUNT, endpoint=f"http://127.0.0.1:{azurite}/{ACCOUNT}").build()

    @pytest.fixture
    def root(self, container):
        return f"{container}/root"


def test_azure_resumes_and_refuses(azurite, container, tmp_path, monkeypatch):
    options = {"account": ACCOUNT, "endpoint": f"http://127.0.0.1:{azurite}/{ACCOUNT}", "retry_timeout": 0.5}
    storage = AzureStorage(chunk_size=0.1, **options).build()
    (tmp_path / "m/s").mkdir(parents=True)
    for name, size in {"a b": 1_000_000, "s/ü": 20_000_000, "empty": 0}.items():
        (tmp_path / "m" / name).write_bytes(bytes(size))
    storage.push(tmp_path / "m", f"{container}/m")
    assert storage.fetch(f"{container}/m", tmp_path / "out").transferred == 21_000_000
    assert storage.fetch(f"{container}/m", tmp_path / "out").transferred == 0
    (tmp_path / "m/a b").write_bytes(b"new")
    storage.push(tmp_path / "m/a b", f"{container}/m/a%20b")
    assert storage.fetch(f"{container}/m", tmp_path / "out").transferred == 3
    with pytest.raises(WMTPError, match=r"nothing is there; in az://.* there is: m"):
        storage.fetch(f"{container}/n", tmp_path / "other")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"wrong").decode())
    with pytest.raises(WMTPError, match="permission denied"):
        AzureStorage(**options).build().fetch(f"{container}/m", tmp_path / "other")


@pytest.fixture(scope="module")
def google():
    process, port = start(
        "fake-gcs-server", "-scheme=http", "-host=127.0.0.1", "-port=PORT", "-backend=memory", "-public-host=127.0.0.1:PORT"
    )
    yield port
    process.kill()


def test_google_is_read(google, tmp_path):
    """The emulator takes no uploads of the kind that obstore sends, so only what is there already can be tried."""
    bucket = f"test-{next(_numbers)}"
    ask(google, "POST", "/storage/v1/b?project=p", json.dumps({"name": bucket}).encode(), {"Content-Type": "application/json"})
    content = {"m/a": b"a" * 300_000, "m/b c": b"b" * 5, "m/sub/ü": b"u" * 1_000_000}

    def put(name):
        place = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}"
        ask(google, "POST", place, content[name], {"Content-Type": "application/octet-stream"})

    for name in content:
        put(name)
    storage = GoogleStorage(endpoint=f"http://127.0.0.1:{google}", anonymous=True, chunk_size=0.05, retry_timeout=0.5).build()
    assert storage.fetch(f"gs://{bucket}/m", tmp_path / "out").transferred == sum(map(len, content.values()))
    assert {name: (tmp_path / "out" / name[2:]).read_bytes() for name in content} == content
    assert Manifest.read(tmp_path / "out" / MANIFEST).files[0].etag
    content["m/a"] = b"changed"
    put("m/a")
    assert storage.fetch(f"gs://{bucket}/m", tmp_path / "out").transferred == 7
    assert storage.localize(f"gs://{bucket}/m/b%20c", tmp_path / "cache").read_bytes() == b"bbbbb"
    with pytest.raises(WMTPError, match=r"nothing is there; in gs://.*/m there is: "):
        storage.fetch(f"gs://{bucket}/m/x", tmp_path / "other")
