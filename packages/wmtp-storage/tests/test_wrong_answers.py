"""Answers with status 200 that are none: a login page, another listing, half of one. Nothing may follow from them."""

import http.server
import re
import threading
from typing import ClassVar
from xml.etree import ElementTree

import pytest
from crossings import sampled

from wmtp.errors import WMTPError
from wmtp.storage.manifest import MANIFEST
from wmtp_storage import GoogleStorage, HTTPStorage, S3Storage, s3_listing, s3_uploads
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
        endpoint=proxy.endpoint, region="us-east-1", **{"retry_timeout": 0.5, "chunk_size": 16 / 1024} | options
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


@pytest.mark.parametrize("seed", sampled(range(12), 4))
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
        (lambda uri: listing(uri, "m/a", bucket="another"), "the listing of another bucket, 'another'"),
        (lambda uri: listing(uri, prefix="n/"), "the listing of 'n/', not of 'm/'"),
        (lambda uri: listing(uri, "n/a"), "'n/a' in it"),
        (lambda uri: listing(uri, "m/b", "m/a"), "'m/a' stands after 'm/b'"),
        (lambda uri: listing(uri, "m/a", truncated="<MaxKeys>1</MaxKeys>"), "does not say whether more follows"),
        (lambda uri: listing(uri, "m/a", truncated="<IsTruncated>no</IsTruncated>"), "does not say whether more follows"),
        (lambda uri: listing(uri, truncated=f"{NO_MORE}<KeyCount>2</KeyCount>"), "0 of the 2 entries that it counts"),
        (lambda uri: listing(uri, "m/a", truncated=f"{NO_MORE}<KeyCount>2</KeyCount>"), "1 of the 2 entries that it counts"),
        (lambda uri: listing(uri).replace(b"<Prefix>m/</Prefix>", b""), "does not say of what"),
        (lambda uri: listing(uri, "m/a", truncated=f"{MORE}<Marker></Marker>"), "first version of the protocol"),
        (lambda uri: listing(uri, prefix="n%2F", truncated=f"{NO_MORE}<EncodingType>url</EncodingType>"), "the listing of 'n%"),
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


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (lambda uri: listing(uri, "m/a", truncated=""), ["a"]),
        (lambda uri: listing(uri, truncated=""), []),
        (lambda uri: listing(uri, "m/a").replace(b"<Prefix>m/</Prefix>", b""), ["a"]),
        (lambda uri: listing(uri, "m/a", "m/a"), ["a"]),
        (lambda uri: listing(uri, "m/a", truncated=f"{NO_MORE}<KeyCount>1</KeyCount>"), ["a"]),
        (
            lambda uri: listing(
                uri, "m%2Fa+b%2Bc", "m%2Fc%01", prefix="m%2F", truncated=f"{NO_MORE}<EncodingType>url</EncodingType>"
            ),
            ["a b+c", "c\x01"],
        ),
        (lambda uri: listing(uri, "m/a+b%20"), ["a+b%20"]),
    ],
)  # fmt: skip
def test_listings_that_other_stores_give(login_page, model, answer, names):
    """Not every store writes what Amazon's does: encoded keys, no echo of the prefix, nothing where nothing follows."""
    proxy = login_page(answer(model), "application/xml", concerns=is_listing)
    assert [file.name for file in storage(proxy).files(f"{model}/")] == names


def test_a_listing_that_breaks_off(login_page, model):
    """Unlike a page of somebody else it is asked for again, and given up in the end."""
    proxy = login_page(listing(model, "m/a")[:-30], "application/xml", concerns=is_listing)
    with pytest.raises(WMTPError, match=r"the answer broke off after \d+ bytes, before the end of its ListBucketResult"):
        list(storage(proxy).files(f"{model}/"))
    assert len(proxy.done) > 1


def test_a_store_that_fails_within_a_listing(login_page, model):
    answer = listing(model, truncated=f"{NO_MORE}<Error><Code>InternalError</Code><Message>broken</Message></Error>")
    with pytest.raises(WMTPError, match="InternalError: broken"):
        list(storage(login_page(answer, "application/xml", concerns=is_listing)).files(f"{model}/"))


def test_an_encoded_continuation_token(faulty, model):
    """Some stores echo the token encoded, or name the next page without saying that there is one."""
    pages = []

    def edit(path, content):
        if not is_listing("GET", path):
            return content
        pages.append(path)
        if len(pages) == 1:
            return listing(model, "m/a", truncated="<NextContinuationToken>a/b+=</NextContinuationToken>")
        return listing(model, "m/b", truncated=f"{NO_MORE}<ContinuationToken>a%2Fb%2B%3D</ContinuationToken>")

    assert [file.name for file in storage(faulty((), edit=edit)).files(f"{model}/")] == ["a", "b"]


def test_keys_that_no_file_can_have_are_left_out(faulty, s3, model, tmp_path):
    """A control character, two slashes, a mark beside the object of its name: said by name, or left out by --exclude."""
    s3.client().put_object(Bucket=model.split("/")[2], Key="m/bad\x01name", Body=b"z")
    more = "".join(OBJECT.format(f"m/{name}") for name in ("a/", "a//b")).replace("<Size>1", "<Size>0").encode()

    def edit(path, content):
        if not is_listing("GET", path) or b"<Prefix>m/</Prefix>" not in content:
            return content
        before, end, after = content.partition(b"</Contents>")
        return re.sub(rb"<KeyCount>\d+</KeyCount>", b"", before + end + more + after)

    back = storage(faulty((), edit=edit))
    with pytest.raises(WMTPError, match=r"'bad\\x01name' holds a control character; leave it out with --exclude"):
        back.fetch(model, tmp_path / "out", exclude=["a//*"])
    with pytest.raises(WMTPError, match="'a//b' cannot be that of a file in a folder"):
        back.fetch(model, tmp_path / "out", exclude=["bad*"])
    back.fetch(model, tmp_path / "out", exclude=["bad*", "a//*"])
    assert {name: (tmp_path / "out" / name).read_bytes() for name in CONTENT} == CONTENT


def test_pages_that_do_not_end(faulty, model):
    numbers = iter(range(10**6))

    def edit(path, content):
        if "list-type" not in path:
            return content
        more = f"{MORE}<NextContinuationToken>{next(numbers)}</NextContinuationToken>"
        return listing(model, truncated=more)

    with pytest.raises(WrongAnswerError, match="1000 pages came one after the other without a new object"):
        list(storage(faulty((), edit=edit)).files(model))


class DirectoryBucket:
    """Answers each question for a listing with the same objects, and another page to follow. The test server has none."""

    address = ""
    pages = 0

    def ask(self, *_):
        self.pages += 1
        more = f"{MORE}<NextContinuationToken>{self.pages}</NextContinuationToken>"
        return ElementTree.fromstring(listing("s3://b--x-s3/m", "m/b", "m/a", truncated=more))


def test_the_same_objects_on_page_after_page_of_a_bucket_without_order():
    """That nothing new comes is all that shows it."""
    with pytest.raises(WrongAnswerError, match="1000 pages came one after the other without a new object"):
        list(s3_listing.S3Listing(DirectoryBucket(), "b--x-s3").pages("m/"))


@pytest.mark.parametrize(
    ("marker", "said"),
    [(lambda number: "m/a", "names one that came before"), (lambda number: f"m/{number:04}", "30 pages came with 0 uploads")],
)
def test_unfinished_uploads_whose_pages_do_not_end(faulty, model, monkeypatch, marker, said):
    monkeypatch.setattr(s3_uploads, "_MOST_EMPTY", 30)
    numbers = iter(range(10**6))

    def edit(path, content):
        if "uploads" not in path:
            return content
        next_one = f"<NextKeyMarker>{marker(next(numbers))}</NextKeyMarker><NextUploadIdMarker>1</NextUploadIdMarker>"
        return f"<ListMultipartUploadsResult>{MORE}{next_one}</ListMultipartUploadsResult>".encode()

    with pytest.raises(WrongAnswerError, match=said):
        storage(faulty((), edit=edit)).tidy(model)


def test_a_key_that_is_listed_twice_is_fetched_as_it_is_now(faulty, model, tmp_path):
    """A store that is slow to agree lists an old version beside the present one, at every try."""
    old = OBJECT.format("m/a").encode()

    def edit(path, content):
        if not is_listing("GET", path) or b"<Prefix>m/</Prefix>" not in content:
            return content
        before, start, after = re.sub(rb"<KeyCount>\d+</KeyCount>", b"", content).partition(b"<Contents>")
        return before + old + start + after

    done = storage(faulty((), edit=edit)).fetch(model, tmp_path / "out")
    assert done.files == len(CONTENT)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in CONTENT} == CONTENT


def test_an_object_whose_name_ends_with_a_slash_is_named(faulty, s3, model, tmp_path):
    """With content it is no mark of a folder, and no file can hold it."""
    s3.client().put_object(Bucket=model.split("/")[2], Key="m/odd", Body=b"z")

    def edit(path, content):
        return content.replace(b"<Key>m/odd</Key>", b"<Key>m/odd/</Key>") if is_listing("GET", path) else content

    back = storage(faulty((), edit=edit))
    with pytest.raises(WMTPError, match="'odd/' cannot be that of a file in a folder; leave it out with --exclude"):
        back.fetch(model, tmp_path / "out")
    back.fetch(model, tmp_path / "out", exclude=["odd/"])
    assert {name: (tmp_path / "out" / name).read_bytes() for name in CONTENT} == CONTENT


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
    yield GoogleStorage(endpoint=f"http://127.0.0.1:{server.server_port}", anonymous=True, retry_timeout=0).build()
    server.shutdown()
    server.server_close()


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


PAGE = {"ETag": '"1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}


@pytest.mark.parametrize("number", [1, 2, 3], ids=["mark", "first file", "second file"])
def test_an_upload_that_a_page_answered(login_page, s3, tmp_path, number):
    """Status 200 with an ETag is what a store answers to a PUT, and any static page too."""
    (tmp_path / "m").mkdir()
    for name in "ab":
        (tmp_path / "m" / name).write_bytes(b"1")
    puts = []

    def concerns(method, path):
        puts.extend([path] if method == "PUT" else [])
        return method == "PUT" and len(puts) == number

    uri = f"s3://{s3.bucket()}/m"
    with pytest.raises(WrongAnswerError if number == 1 else WMTPError, match="the upload was answered, but the store does not"):
        storage(login_page(concerns=concerns, headers=PAGE)).push(tmp_path / "m", uri)
    assert list(S3Storage().build().files(uri)) == []


def test_an_upload_of_one_file_that_a_page_answered(login_page, model, tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    proxy = login_page(concerns=lambda method, path: method == "PUT", headers=PAGE)
    for name, said in (("new", "does not have it"), ("a", "has another object of 30720 bytes there")):
        with pytest.raises(WMTPError, match=f"the upload was answered, but the store {said}.*a proxy or a login page"):
            storage(proxy).push(tmp_path / "x", f"{model}/{name}")


class Web(http.server.BaseHTTPRequestHandler):
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

    def log_message(self, *_):
        pass


@pytest.fixture
def web(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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
