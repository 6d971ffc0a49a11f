"""A store that is away for a while, and answers that break off: any request is sent again, by time and not by number."""

import contextlib
import http.client
import logging
import random
import re
import socket
import threading
import time
from itertools import product

import pytest
from crossings import sampled
from obstore.exceptions import GenericError

from wmtp.config.load import load
from wmtp.errors import ConfigError, WMTPError
from wmtp.storage.manifest import MANIFEST, Manifest
from wmtp_storage import HTTPStorage, S3Storage, retrying
from wmtp_storage.retrying import Retries

KB = 2**10
CONTENT = {"a": b"1" * 30 * KB, "b/c": b"2", "large": random.Random(1).randbytes(17 * 2**20)}


@pytest.fixture
def folder(tmp_path):
    for name, data in CONTENT.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(data)
    return tmp_path / "m"


def storage(endpoint, **options):
    return S3Storage(endpoint=endpoint, region="us-east-1", **options).build()


class Breaking:
    """Passes bytes between clients and a server, and cuts connections as a schedule says.

    Args:
        endpoint: of the server.
        seed: of the schedule.
        share: of the connections that are cut.
        most: so many are cut, and then none.
        direction: what is cut: ``requests`` while they are sent, ``answers`` while they come, or ``both``.
        of: a pattern of request lines: the answers to the first ``most`` of these are cut, and nothing else.
    """

    def __init__(self, endpoint, *, seed=0, share=0.3, most=None, direction="both", longest=3000, of=None):
        host, _, port = endpoint.partition("://")[2].partition(":")
        self._server, self._random = (host, int(port)), random.Random(seed)
        self._share, self._left, self._direction, self._longest = share, most, direction, longest
        self._of = of
        self.cut = 0
        self.is_away = False
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_away:
                    client.close()
                    continue
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client):
        with contextlib.suppress(OSError):
            server = socket.create_connection(self._server)
            with self._lock:
                cuts = self._random.random() < self._share and self._left != 0
                after = self._random.randrange(1, self._longest)
                chosen = self._random.choice(["requests", "answers"]) if self._direction == "both" else self._direction
                if cuts and self._left is not None:
                    self._left -= 1
            if self._of is not None:
                asked = []
                threading.Thread(target=self._pump_answers, args=(server, client, asked, after), daemon=True).start()
                self._pump(client, server, None, asked)
                return
            pumps = [(client, server, "requests"), (server, client, "answers")]
            for source, target, name in pumps:
                left = after if cuts and chosen == name else None
                threading.Thread(target=self._pump, args=(source, target, left), daemon=True).start()

    def _pump_answers(self, source, target, asked, after):
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if asked and self._left:
                    self._left -= 1
                    self.cut += 1
                    target.sendall(data[: after % len(data)])
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pump(self, source, target, left, asked=None):
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if asked is not None and re.match(self._of, data):
                    asked.append(data)
                if self.is_away:
                    break
                if left is not None and len(data) >= left:
                    target.sendall(data[:left])
                    self.cut += 1
                    break
                left = None if left is None else left - len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.close()


@pytest.fixture
def breaking(s3):
    made = []
    yield lambda **options: made.append(Breaking(s3.endpoint, **options)) or made[-1]
    for proxy in made:
        proxy.close()


def fetched(target):
    return {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file() and p.name != MANIFEST}


@pytest.mark.parametrize(("seed", "direction"), sampled(product(range(4), ("requests", "answers", "both")), 5))
def test_every_request_survives_connections_that_break(breaking, s3, folder, tmp_path, seed, direction):
    """Uploads, listings, copies, deletions and questions, in the middle of what they send or of what they are sent."""
    uri = f"s3://{s3.bucket()}/x/m"
    proxy = breaking(seed=seed, share=0.7, direction=direction, longest=(400, 3000, 20_000)[seed % 3])
    through = storage(proxy.endpoint, retry_timeout=300, max_connections=6)
    for content in (b"1", b"new"):
        (folder / "b/c").write_bytes(content)
        through.push(folder, uri)
    through.fetch(uri, tmp_path / "out")
    assert fetched(tmp_path / "out") == CONTENT | {"b/c": b"new"}
    assert {file.name for file in through.files(uri)} == set(CONTENT)
    through.tidy(uri.rpartition("/")[0])
    through.remove(uri)
    assert not through.exists(uri)
    assert proxy.cut > 0, "no connection was cut"


REQUESTS = {
    "end of an upload": rb"POST /\S*uploadId=",
    "listing": rb"GET /\S*list-type",
    "beginning of an upload": rb"POST /\S*[?&]uploads",
    "part": rb"PUT /\S*partNumber=",
    "whole object": rb"PUT /\S*/a ",
    "question": rb"HEAD /",
    "range": rb"GET /\S*/large ",
    "deletion": rb"(POST /\S*[?&]delete|DELETE )",
}


@pytest.mark.parametrize(("name", "seed"), sampled([(name, seed) for seed in range(2) for name in REQUESTS], 9))
def test_an_answer_that_breaks_off_is_asked_for_again(breaking, s3, folder, tmp_path, name, seed):
    """Up to three times, after so many bytes as the seed says; the request itself had its effect each time."""
    uri = f"s3://{s3.bucket()}/x/m"
    proxy = breaking(of=REQUESTS[name], share=0, most=3, seed=seed, longest=(40, 400)[seed])
    through = storage(proxy.endpoint, retry_timeout=300, max_connections=4)
    through.push(folder, uri)
    through.fetch(uri, tmp_path / "out")
    assert fetched(tmp_path / "out") == CONTENT
    assert {file.name for file in through.files(uri)} == set(CONTENT)
    through.remove(uri)
    assert not through.exists(uri)
    assert proxy.cut > 0, "no answer was cut"


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        *sampled([(work, 2) for work in ("fetch", "exists", "files", "push", "remove", "tidy")], 3),
        *(pytest.param(work, 20, marks=pytest.mark.slow) for work in ("fetch", "push", "remove")),
        *(pytest.param(work, 60, marks=pytest.mark.slow) for work in ("fetch", "push")),
    ],
)
def test_a_store_that_is_away_for_a_while(breaking, s3, folder, tmp_path, work, seconds):
    """Longer than any number of quick tries takes."""
    uri = f"s3://{s3.bucket()}/x/m"
    clean = S3Storage().build()
    clean.push(folder, uri)
    proxy = breaking(share=0)
    through = storage(proxy.endpoint, retry_timeout=300)
    proxy.is_away = True
    began = time.monotonic()
    threading.Timer(seconds, setattr, (proxy, "is_away", False)).start()
    does = {
        "exists": lambda: through.exists(uri),
        "files": lambda: [file.name for file in through.files(uri)],
        "push": lambda: through.push(folder, uri),
        "fetch": lambda: through.fetch(uri, tmp_path / "out"),
        "remove": lambda: through.remove(uri),
        "tidy": lambda: through.tidy(uri.rpartition("/")[0]),
    }
    does[work]()
    assert time.monotonic() - began >= seconds
    assert clean.exists(uri) == (work != "remove")


@pytest.mark.slow
def test_what_never_comes_back_ends_at_its_time(breaking, folder, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "wmtp")
    monkeypatch.setattr(retrying, "_SAYS_SO_AFTER", 0.1)  # seldom is there a try between this and 4 s otherwise
    proxy = breaking(share=0)
    proxy.is_away = True
    for do in (
        lambda back: back.exists("s3://b/x"),
        lambda back: list(back.files("s3://b/x/")),
        lambda back: back.push(folder, "s3://b/x"),
    ):
        began = time.monotonic()
        with pytest.raises(WMTPError, match="s3://b/x"):
            do(storage(proxy.endpoint, retry_timeout=4))
        assert 3.9 < time.monotonic() - began < 60
    assert "trying again for up to 4 s" in caplog.text, "whoever waits is told so"


def test_the_last_try_is_at_the_end_of_the_time(monkeypatch):
    """An outage that is shorter than the limit is always survived."""
    now = [0.0]
    monkeypatch.setattr(retrying.time, "monotonic", lambda: now[0])
    for seed in range(50):
        random.seed(seed)
        now[0], tries = 0.0, []
        waiting = Retries(20, "x")
        while (pause := waiting.pause(GenericError("reset"))) is not None:
            assert pause <= 5
            now[0] += pause
            tries.append(now[0])
        assert tries[-1] == pytest.approx(20)
        assert 8 < len(tries) < 40


def test_what_is_hopeless_is_said_at_once(monkeypatch, tmp_path):
    """A wrong certificate, no credentials, an address that is none: nothing of it is better in five minutes."""
    began = time.monotonic()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(WMTPError):
        S3Storage(endpoint="http://127.0.0.1:1", region="us-east-1").build().exists("s3://bucket/x")
    assert time.monotonic() - began < 60


def test_an_empty_object_whose_etag_is_no_md5(faulty, s3, tmp_path):
    """As encrypted ones have: it was fetched for ever."""
    bucket = s3.bucket()
    s3.store(bucket).put("m/empty", b"")
    s3.store(bucket).put("m/x", b"1")
    md5 = b"d41d8cd98f00b204e9800998ecf8427e"
    back = storage(faulty((), edit=lambda path, content: content.replace(md5, b"0" * 32)).endpoint)
    done = []
    thread = threading.Thread(target=lambda: done.append(back.fetch(f"s3://{bucket}/m", tmp_path / "out")), daemon=True)
    thread.start()
    thread.join(300)
    assert done, "it never ends"
    assert fetched(tmp_path / "out") == {"empty": b"", "x": b"1"}
    checked = {file.name: file.checked for file in Manifest.read(tmp_path / "out" / MANIFEST).files}
    assert checked == {"empty": None, "x": "md5"}


def test_the_former_key_says_what_to_write(tmp_path):
    (tmp_path / "c.toml").write_text("[storage.s3]\nmax_retries = 3\n")
    with pytest.raises(
        ConfigError, match=r"c\.toml:2: storage\.s3\.max_retries: requests are tried again by time; write retry_timeout"
    ):
        load(tmp_path / "c.toml")


def test_a_web_server_whose_answers_break_off(breaking, s3, tmp_path):
    host, _, port = s3.webdav.partition("://")[2].partition(":")
    connection = http.client.HTTPConnection(host, int(port))
    proxy = Breaking(s3.webdav, seed=3, share=0.5, direction="answers", longest=600)
    web = HTTPStorage(retry_timeout=300).build()
    name = f"patience-{time.time_ns()}"
    (tmp_path / "m/sub").mkdir(parents=True)
    for path in ("a", "sub/b"):
        (tmp_path / "m" / path).write_bytes(b"1" * 5000)
    web.push(tmp_path / "m", f"{proxy.endpoint}/{name}/m")
    web.fetch(f"{proxy.endpoint}/{name}/m", tmp_path / "out")
    assert fetched(tmp_path / "out") == dict.fromkeys(("a", "sub/b"), b"1" * 5000)
    web.remove(f"{proxy.endpoint}/{name}/m")
    assert proxy.cut > 0, "no answer was cut"
    proxy.close()
    connection.close()
