"""A real S3 server for the tests, and a proxy before it that does to answers what networks do."""

import contextlib
import http.client
import random
import re
import socket
import socketserver
import struct
import threading
import time
from urllib.parse import urlsplit

import pytest
from false_answers import CONTENT

from wmtp_storage import retrying
from wmtp_storage.testing import s3_server

__all__ = ["s3_server"]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    """Send requests again after a hundredth of a second at first; `retry_timeout` says for how long, as ever."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.01)


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The S3 server, found by what the environment says; no proxy and no profile of the user gets in between."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def model(s3):
    """A folder in the store that holds `CONTENT`."""
    bucket = s3.bucket()
    for name, data in CONTENT.items():
        s3.store(bucket).put(f"m/{name}", data)
    return f"s3://{bucket}/m"


@pytest.fixture
def faulty(s3):
    """Makes proxies before the S3 server."""
    with contextlib.ExitStack() as stack:
        yield lambda faults, **options: stack.enter_context(FaultyProxy(s3.endpoint, faults, **options))


@pytest.fixture
def refusing(s3):
    """Makes proxies before the S3 server that refuse; see `RefusingProxy`."""
    with contextlib.ExitStack() as stack:
        yield lambda *refusal, **options: stack.enter_context(RefusingProxy(s3.endpoint, *refusal, **options))


@pytest.fixture
def login_page(s3):
    """Makes proxies before the S3 server that answer with a page of their own; see `LoginProxy`."""
    with contextlib.ExitStack() as stack:
        yield lambda *page, **options: stack.enter_context(LoginProxy(s3.endpoint, *page, **options))


_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FaultyProxy:
    """Passes requests on to a server, and spoils some of the answers to GETs of objects.

    Args:
        endpoint: of the server.
        faults: what may happen to an answer.
        seed: of the schedule.
        share: of the answers that are spoiled.
        most: so many are spoiled at most; None for no limit.
        stall: seconds that a stalled answer takes.
        on_get: called before each GET of an object with its number.
        edit: changes the content of an answer, given the path and the content.
    """

    def __init__(
        self,
        endpoint,
        faults,
        *,
        seed=0,
        share=0.5,
        most=None,
        stall=1.0,
        on_get=lambda number: None,
        edit=lambda path, content: content,
    ):
        self._edit = edit
        self._server = urlsplit(endpoint)
        self._faults, self._share, self._left, self._stall, self._on_get = list(faults), share, most, stall, on_get
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._gets = 0
        self.requests = []
        self.done = []

    def __enter__(self):
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    proxy._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, address):
                pass

        self._listener = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._listener.server_address[1]}"
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown()
        self._listener.server_close()

    def _serve(self, client):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        upstream = http.client.HTTPConnection(self._server.hostname, self._server.port)
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                received = client.recv(2**16)
                if not received:
                    return
                data += received
            head, data = data.split(b"\r\n\r\n", 1)
            first, *lines = head.decode("latin-1").split("\r\n")
            method, path, _ = first.split(" ")
            headers = [line.split(": ", 1) if ": " in line else line.split(":", 1) for line in lines]
            length = int(next((value for name, value in headers if name.lower() == "content-length"), 0))
            while len(data) < length:
                data += client.recv(2**16)
            body, data = data[:length], data[length:]
            fault = self._choose(method, path)
            if fault == "login":  # the server never hears of it
                self._answer(client, method, None, b"", fault)
                continue
            if fault == "whole":
                headers = [(name, value) for name, value in headers if name.lower() != "range"]
            upstream.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content = self._edit(path, answer.read())
            if not self._answer(client, method, answer, content, fault):
                return

    def _choose(self, method, path):
        with self._lock:
            self.requests.append((method, path))
            if method != "GET" or "list-type" in path:
                return None
            self._gets += 1
            number = self._gets
            fault = None
            if self._faults and self._left != 0 and self._random.random() < self._share:
                fault = self._random.choice(self._faults)
                self._left = None if self._left is None else self._left - 1
                self.done.append(fault)
        self._on_get(number)
        return fault

    def _answer(self, client, method, answer, content, fault):
        """Return True if the connection goes on."""
        status, headers = answer.status, dict(answer.getheaders())
        headers = {name: value for name, value in headers.items() if name.lower() not in ("transfer-encoding", "connection")}
        if status >= 300 or method == "HEAD":
            fault = None
        length = len(content) if method != "HEAD" else int(headers.get("Content-Length", 0))
        if fault in ("500", "503", "429"):
            content = _SLOW_DOWN
            status, headers, length = int(fault), {"Content-Type": "application/xml"}, len(content)
        if fault == "corrupt" and content:
            where = self._random.randrange(len(content))
            content = content[:where] + bytes([content[where] ^ 0x10]) + content[where + 1 :]
        if fault == "other-etag":
            headers["Etag"] = headers["ETag"] = '"0123456789abcdef0123456789abcdef"'
        if fault == "shifted" and "Content-Range" in headers:
            start, end, size = map(int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers["Content-Range"]).groups())
            headers["Content-Range"] = f"bytes {start + 1}-{end + 1}/{size + 1}"
        if fault == "short" and content:
            content = content[: self._random.randrange(len(content))]
            length = len(content)
        headers["Content-Length"] = str(length)
        lines = [f"HTTP/1.1 {status} {answer.reason}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        if fault == "garbage":
            client.sendall(b"\0\1\2 this is no HTTP\r\n\r\n")
            return False
        client.sendall("\r\n".join(lines).encode("latin-1"))
        if method == "HEAD":
            return True
        if fault in ("cut", "reset", "stall"):
            client.sendall(content[: self._random.randrange(len(content) + 1)])
            if fault == "stall":
                time.sleep(self._stall)
            if fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            return False
        client.sendall(content)
        return True


class RefusingProxy(FaultyProxy):
    """Passes so many requests on, and refuses all that follow. As on Amazon's servers the answer to a HEAD has no body.

    Args:
        endpoint: of the server.
        status: of the refusals.
        code: what they are called.
        message: what they say.
        after: so many requests are passed on before.
        most: so many are refused, and then none; None for no end.
        only: requests with another method are passed on, and not counted.
    """

    def __init__(self, endpoint, status, code, message, *, after=0, most=None, only=None):
        super().__init__(endpoint, ())
        self.refusal = (status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())
        self.after, self.most, self.only, self.passed, self.refused = after, most, only, 0, 0

    def _choose(self, method, path):
        with self._lock:
            self.requests.append((method, path))
            if self.only not in (None, method):
                return None
            if self.passed < self.after or self.refused == self.most:
                self.passed += 1
                return None
            self.refused += 1
            return "refuse"

    def _answer(self, client, method, answer, content, fault):
        if fault != "refuse":
            return super()._answer(client, method, answer, content, fault)
        status, body = self.refusal
        length = 0 if method == "HEAD" else len(body)
        client.sendall(f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\n\r\n".encode())
        client.sendall(body[:length])
        return True


LOGIN = b"<html><head><title>Log in to the network</title></head><body>Password?</body></html>"


class LoginProxy(FaultyProxy):
    """Answers some requests itself, with status 200, as a network does that wants a login first.

    Args:
        endpoint: of the server.
        body: of its answers.
        kind: their content type.
        seed: of the schedule.
        share: of the requests that it answers.
        headers: of its answers, besides.
        concerns: whether it may answer a request, given method and path.
    """

    def __init__(
        self, endpoint, body=LOGIN, kind="text/html", *, seed=0, share=1.0, headers=(), concerns=lambda method, path: True
    ):
        super().__init__(endpoint, ("login",), seed=seed, share=share)
        self.page = (body, {"Content-Type": kind, **dict(headers)})
        self.concerns = concerns

    def _choose(self, method, path):
        with self._lock:
            self.requests.append((method, path))
            if not self.concerns(method, path) or self._random.random() >= self._share:
                return None
            self.done.append((method, path))
            return "login"

    def _answer(self, client, method, answer, content, fault):
        if fault != "login":
            return super()._answer(client, method, answer, content, fault)
        body, headers = self.page
        lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items())]
        client.sendall("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else body))
        return True
