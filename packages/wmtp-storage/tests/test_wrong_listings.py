"""Listings of something else, half listings, pages without end, and odd ones that are right."""

import re
from xml.etree import ElementTree

import pytest
from false_answers import CONTENT, MORE, NO_MORE, OBJECT, is_listing, listing, storage

from wmtp.errors import WMTPError
from wmtp_storage import S3Storage, s3_listing, s3_uploads
from wmtp_storage.failures import WrongAnswerError


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


def test_the_same_page_again(login_page, model):
    page = listing(model, "m/a", "m/b", truncated=f"{MORE}<NextContinuationToken>1</NextContinuationToken>")
    proxy = login_page(page, "application/xml", concerns=is_listing)
    with pytest.raises(WrongAnswerError, match="'m/a' stands after 'm/b'"):
        list(storage(proxy).files(model))
    assert len(proxy.done) == 2
