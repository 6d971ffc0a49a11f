"""Login pages in place of an S3 store's answers: an error, and nothing is taken for empty or done."""

import pytest
from crossings import sampled
from false_answers import CONTENT, KB, PAGE, XHTML, is_listing, storage

from wmtp.errors import WMTPError
from wmtp.storage.manifest import MANIFEST
from wmtp_storage import S3Storage
from wmtp_storage.failures import WrongAnswerError


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
