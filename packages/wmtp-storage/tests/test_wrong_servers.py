"""Google's store and plain web servers that answer with a page, or cannot list."""

from typing import ClassVar

import pytest
from false_answers import PAGE, XHTML, listing
from small_server import Answers, serving

from wmtp.errors import WMTPError
from wmtp_storage import GoogleStorage, HTTPStorage
from wmtp_storage.failures import WrongAnswerError


class Google(Answers):
    """Answers listings by what is set in the class, and says of all objects that there are none."""

    protocol_version = "HTTP/1.1"
    listings = ()
    heads = 404

    def do_GET(self):
        body = Google.listings[0] if len(Google.listings) == 1 else Google.listings.pop(0)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.send_response(Google.heads)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def google(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(Google) as server:
        yield GoogleStorage(endpoint=f"http://127.0.0.1:{server.server_port}", anonymous=True, retry_timeout=0).build()


def test_google_is_asked_twice_whether_a_folder_is_empty(google):
    empty = listing("gs://b/m", bucket="b")
    Google.listings, Google.heads = [empty], 404
    assert list(google.files("gs://b/m")) == []
    Google.listings, Google.heads = [XHTML], 200
    with pytest.raises(WMTPError, match="a proxy or a login page"):
        list(google.files("gs://b/m"))
    Google.listings, Google.heads = [listing("gs://b/m", "m/a", bucket="b")], 200
    with pytest.raises(WrongAnswerError, match="a proxy or a login page"):  # a short page may come from anybody, too
        list(google.files("gs://b/m/"))
    Google.listings, Google.heads = [XHTML, listing("gs://b/m", "m/a", bucket="b")], 404
    with pytest.raises(WrongAnswerError, match="two listings, one after the other, differ"):
        list(google.files("gs://b/m/"))
    Google.listings = [listing("gs://b/m", "m/a", bucket="b")]
    assert [file.name for file in google.files("gs://b/m/")] == ["a"]


class Web(Answers):
    """Answers each method by what is set in the class: a status, and headers."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[dict] = {}

    def answer(self):
        status, headers = Web.answers.get(self.command, (405, {}))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_DELETE = do_PROPFIND = do_MKCOL = answer


@pytest.fixture
def web(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(Web) as server:
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_web_server_that_refuses_to_list(web, tmp_path, status):
    """Whoever may not look knows nothing of what is there."""
    Web.answers = {"HEAD": (404, {}), "GET": (404, {}), "PROPFIND": (status, {})}
    back = HTTPStorage(retry_timeout=0).build()
    for ask in (
        lambda: list(back.files(f"{web}/m/")),
        lambda: back.exists(f"{web}/m"),
        lambda: back.fetch(f"{web}/m", tmp_path),
    ):
        with pytest.raises(WMTPError, match="could not be listed"):
            ask()


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_web_server_that_cannot_list(web, tmp_path, status):
    Web.answers = {"HEAD": (404, {}), "GET": (404, {}), "PROPFIND": (status, {})}
    back = HTTPStorage(retry_timeout=0).build()
    assert not back.exists(f"{web}/m")
    with pytest.raises(WMTPError, match="nothing is there"):
        back.fetch(f"{web}/m", tmp_path / "out")


def test_a_static_page_in_place_of_a_web_server(web, tmp_path):
    page = {"Content-Length": "7", **PAGE}
    Web.answers = {"HEAD": (404, {}), "GET": (404, {}), "PUT": (200, page | {"Content-Length": "0"})}
    (tmp_path / "x").write_bytes(b"123")
    with pytest.raises(WMTPError, match="the upload was answered, but the store does not have it"):
        HTTPStorage(retry_timeout=0).build().push(tmp_path / "x", f"{web}/x")
    Web.answers = {"HEAD": (200, page), "DELETE": (200, {})}
    with pytest.raises(WMTPError, match="the deletion was answered, and it is still there"):
        HTTPStorage(retry_timeout=0).build().remove(f"{web}/x")
