"""Answers with status 200 that are none: a login page, another listing, half of one. Nothing may follow from them."""

import http.server
import threading

import pytest

from wmtp.errors import WMTPError
from wmtp.storage.manifest import MANIFEST
from wmtp_storage import GoogleStorage, S3Storage
from wmtp_storage.failures import WrongAnswerError

KB = 2**10
CONTENT = {"a": b"1" * 30 * KB, "b/c": b"2", "d e": b"3" * 5}
LISTING = (
    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
    "<Prefix>m/</Prefix>{truncated}{objects}</ListBucketResult>"
)
OBJECT = (
    "<Contents><Key>{}</Key><ETag>&#34;1&#34;</ETag><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
)
MORE = "<IsTruncated>true</IsTruncated>"
NO_MORE = "<IsTruncated>false</IsTruncated>"
XHTML = b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title>Log in</title></head><body/></html>'


@pytest.fixture
def model(s3):
    bucket = s3.bucket()
    for name, data in CONTENT.items():
        s3.store(bucket).put(f"m/{name}", data)
    return f"s3://{bucket}/m"


def storage(proxy, **options):
    return S3Storage(
        endpoint=proxy.endpoint, region="us-east-1", **{"max_retries": 1, "chunk_size": 16 / 1024} | options
    ).build()


def is_listing(method, path):
    return "list-type" in path


def listing(uri, *keys, truncated=NO_MORE, **changes):
    bucket = changes.get("bucket", uri.split("/")[2])
    text = LISTING.format(bucket=bucket, truncated=truncated, objects="".join(map(OBJECT.format, keys)))
    return text.replace("<Prefix>m/", f"<Prefix>{changes.get('prefix', 'm/')}").encode()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html><head><title>Log in</title></head><body>Password?</body></html>", "text/html"),
        (b"<!DOCTYPE html><html><head><meta charset=utf-8></head><body>hi<br></body></html>", "text/html"),
        (XHTML, "application/xhtml+xml"),
        (b'{"objects": []}', "application/json"),
        (b"", "text/plain"),
        (b"<ListAllMyBucketsResult/>", "application/xml"),
        (b"<EnumerationResults><Blobs/></EnumerationResults>", "application/xml"),
        (b"\xff\xfe\x00", "application/octet-stream"),
    ],
)
@pytest.mark.parametrize("concerns", [is_listing, lambda method, path: True], ids=["listings", "all"])
def test_a_page_in_place_of_a_listing(login_page, model, tmp_path, body, kind, concerns):
    proxy = login_page(body, kind, concerns=concerns)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/x").write_text("x")
    for ask in (
        lambda: list(storage(proxy).files(model)),
        lambda: storage(proxy).exists(f"{model}/"),
        lambda: storage(proxy).fetch(model, tmp_path / "out"),
        lambda: storage(proxy).localize(model, tmp_path / "cache"),
        lambda: storage(proxy).push(tmp_path / "new", model),
        lambda: storage(proxy).remove(model),
        lambda: storage(proxy).tidy(model.rpartition("/")[0]),
    ):
        with pytest.raises(WMTPError, match="a proxy or a login page may have answered in the store's place") as caught:
            ask()
        assert str(caught.value).startswith("s3://")
        if concerns is is_listing:
            assert kind in str(caught.value), "it says what came"
    assert {file.name: file.size for file in S3Storage().build().files(model)} == {n: len(d) for n, d in CONTENT.items()}
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_page_with_an_etag_is_no_object(login_page, model, tmp_path):
    """A static page has an ETag and a time of change, as an object has."""
    headers = {"ETag": '"1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    with pytest.raises(WMTPError, match="a proxy or a login page"):
        storage(login_page(headers=headers)).fetch(f"{model}/a", tmp_path / "out")
    assert not (tmp_path / "out/a").exists()


@pytest.mark.parametrize("seed", range(12))
def test_pages_now_and_then(login_page, s3, model, tmp_path, seed):
    """Whatever was answered by a page: what is said is an error, and what is there is what was there, or what was pushed."""
    share = (0.05, 0.2, 0.5)[seed % 3]
    proxy = login_page(seed=seed, share=share)
    uri, new = f"{model}-{seed}", {"a": b"9" * 30 * KB, "z": b"8"}
    (tmp_path / "old/b").mkdir(parents=True)
    for name, data in CONTENT.items():
        (tmp_path / "old" / name).write_bytes(data)
    (tmp_path / "new").mkdir()
    for name, data in new.items():
        (tmp_path / "new" / name).write_bytes(data)
    S3Storage().build().push(tmp_path / "old", uri)

    def said(act):
        try:
            act()
        except WMTPError as error:
            return str(error)
        return None

    failed = said(lambda: storage(proxy).fetch(uri, tmp_path / "out"))
    assert failed is None or "nothing is there" not in failed
    if failed is None:
        assert {name: (tmp_path / "out" / name).read_bytes() for name in CONTENT} == CONTENT
    failed = said(lambda: storage(proxy).push(tmp_path / "new", uri))
    clean = S3Storage().build()
    said(lambda: storage(proxy).tidy(uri.rpartition("/")[0]))
    found = {file.name for file in clean.files(uri)}
    if ".wmtp-incomplete" in found:
        assert failed is not None
    elif found:
        clean.fetch(uri, tmp_path / "after")
        after = {p.relative_to(tmp_path / "after").as_posix(): p.read_bytes() for p in (tmp_path / "after").rglob("*")
                 if p.is_file() and p.name != MANIFEST}  # fmt: skip
        assert after in ([new] if failed is None else [CONTENT, new])
    else:  # all was copied, and the mark could not be taken away
        assert failed is not None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda uri: listing(uri, "m/a")[:-30], "no whole ListBucketResult"),
        (lambda uri: listing(uri, "m/a", bucket="another"), "the listing of another bucket, 'another'"),
        (lambda uri: listing(uri, prefix="n/"), "the listing of 'n/', not of 'm/'"),
        (lambda uri: listing(uri, "n/a"), "'n/a' in it"),
        (lambda uri: listing(uri, "m/b", "m/a"), "'m/a' stands after 'm/b'"),
        (lambda uri: listing(uri, "m/a", "m/a"), "'m/a' stands after 'm/a'"),
        (lambda uri: listing(uri, "m/a", truncated=""), "does not say whether more follows"),
        (lambda uri: listing(uri, "m/a", truncated=MORE), "more follows, and names none"),
        (lambda uri: listing(uri, "m/a").replace(b"<Size>1", b"<Size>"), "has no size or no time"),
        (lambda uri: listing(uri, truncated=f"{MORE}<NextContinuationToken>1</NextContinuationToken>"), "the same page again"),
        (lambda uri: listing(uri, "m/a", truncated=f"{NO_MORE}<ContinuationToken>x</ContinuationToken>"), "another page"),
    ],
)  # fmt: skip
def test_a_listing_of_something_else(login_page, model, answer, said):
    proxy = login_page(answer(model), "application/xml", concerns=is_listing)
    with pytest.raises(WrongAnswerError, match=said):
        list(storage(proxy).files(model))


def test_pages_that_do_not_end(faulty, model):
    numbers = iter(range(10**6))

    def edit(path, content):
        if "list-type" not in path:
            return content
        more = f"{MORE}<NextContinuationToken>{next(numbers)}</NextContinuationToken>"
        return listing(model, truncated=more)

    with pytest.raises(WrongAnswerError, match="1000 pages came one after the other without an object"):
        list(storage(faulty((), edit=edit)).files(model))


def test_a_page_in_place_of_a_later_page_of_a_listing(login_page, s3):
    """The first thousand objects alone would look like all."""
    bucket = s3.bucket()
    store = s3.store(bucket)
    names = [f"m/{number:04}{mark}" for number in range(1100) for mark in ("", "/x", " y")[number % 3 :][:1]]
    for name in names:
        store.put(name, b"")
    uri = f"s3://{bucket}/m"
    assert sorted(f"m/{file.name}" for file in S3Storage().build().files(uri)) == sorted(names)
    proxy = login_page(concerns=lambda method, path: "continuation-token" in path)
    with pytest.raises(WrongAnswerError, match="text/html"):
        list(storage(proxy).files(uri))


def test_the_same_page_again(faulty, s3):
    bucket = s3.bucket()
    for number in range(1001):
        s3.store(bucket).put(f"m/{number:04}", b"")
    pages = []

    def edit(path, content):
        if is_listing("GET", path):
            pages.append(content)
            return pages[0]
        return content

    with pytest.raises(WrongAnswerError, match="'m/0000' stands after 'm/0999'"):
        list(storage(faulty((), edit=edit)).files(f"s3://{bucket}/m"))


def test_copies_that_did_not_happen(login_page, model, tmp_path):
    """obstore takes any answer to a copy for a success."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a").write_bytes(b"9" * 30 * KB)
    uploaded = []

    def concerns(method, path):
        uploaded.extend([path] if method == "PUT" else [])
        return method == "PUT" and len(uploaded) == 3  # the file beside the folder, the mark, the copy

    with pytest.raises(WMTPError, match=r"could not be replaced: what came is no whole CopyObjectResult.*half replaced"):
        storage(login_page(concerns=concerns)).push(tmp_path / "a", model)
    with pytest.raises(WMTPError, match="the folder is half-written"):
        S3Storage().build().fetch(model, tmp_path / "out")


def test_unfinished_uploads_are_asked_of_the_store(login_page, s3, model):
    proxy = login_page(concerns=lambda method, path: "uploads" in path)
    with pytest.raises(WrongAnswerError, match=r"unfinished uploads .* a proxy or a login page"):
        storage(proxy).tidy(model)


class Google(http.server.BaseHTTPRequestHandler):
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

    def log_message(self, *_):
        pass


@pytest.fixture
def google(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Google)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield GoogleStorage(endpoint=f"http://127.0.0.1:{server.server_port}", anonymous=True, max_retries=0).build()
    server.shutdown()
    server.server_close()


def test_google_is_asked_twice_whether_a_folder_is_empty(google):
    empty = listing("gs://b/m", bucket="b")
    Google.listings, Google.heads = [empty], 404
    assert list(google.files("gs://b/m")) == []
    Google.listings, Google.heads = [XHTML], 200
    with pytest.raises(WMTPError, match="a proxy or a login page"):
        list(google.files("gs://b/m"))
    Google.listings, Google.heads = [XHTML, listing("gs://b/m", "m/a", bucket="b")], 404
    with pytest.raises(WrongAnswerError, match="two listings, one after the other, differ"):
        list(google.files("gs://b/m/"))
    Google.listings = [listing("gs://b/m", "m/a", bucket="b")]
    assert [file.name for file in google.files("gs://b/m/")] == ["a"]
