"""Meaning of URIs, and what users get wrong in them."""

import pytest

from wmtp.errors import ConfigError
from wmtp_storage.uris import RemoteURI, parse


@pytest.mark.parametrize(
    ("uri", "authority", "key"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("S3://bucket/a/b", "bucket", "a/b"),
        ("s3://bucket/a/b/", "bucket", "a/b"),
        ("gs://bucket/with space/ü", "bucket", "with space/ü"),
        ("az://container/100%25%231", "container", "100%#1"),
        ("abfss://container@account.dfs.core.windows.net/x", "container@account.dfs.core.windows.net", "x"),
        ("https://host:8080/a/b.json?sig=1%2F2", "host:8080", "a/b.json"),
    ],
)
def test_what_a_uri_names(uri, authority, key):
    assert (parse(uri).authority, parse(uri).key) == (authority, key)
    assert parse(uri).is_folder == (uri.endswith("/") and key != "")


def test_a_signature_stays_and_is_not_shown():
    uri = parse("https://host/a?sig=secret")
    assert uri.query == "sig=secret"
    assert "secret" not in str(uri)
    assert str(uri.at("b c")) == "https://host/a/b%20c"
    assert uri.at("b").query == "sig=secret", "the signature is for all of the folder"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("https:///x", "names no host"),
        ("s3://bucket/a/../b", "'.' and '..' mean nothing"),
        ("s3://bucket/a/%2e%2e/b", "'.' and '..' mean nothing"),
        ("s3://bucket/./b", "'.' and '..' mean nothing"),
        ("s3://bucket/a/.", "'.' and '..' mean nothing"),
        ("s3://bucket/a//b", "nothing between two slashes"),
        ("s3://bucket/a#1", "'#' %23"),
        ("s3://bucket/a?b", "'?' must be written %3F"),
        ("s3://bucket/100%", "'%' in a name must be written %25"),
        ("s3://bucket/%ff", "no UTF-8"),
        ("s3://bucket/a%0Ab", "control character"),
        ("s3://key:secret@bucket/a", "holds a user's name; remove it"),
        ("https://me:secret@host/a", "holds a user's name"),
        ("s3://bucket?x", "a '/' must be between the bucket"),
    ],
)
def test_what_is_wrong_is_said(uri, message):
    with pytest.raises(ConfigError) as raised:
        parse(uri)
    assert message in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_place_in_a_folder():
    assert str(parse("s3://bucket/")) == str(parse("s3://bucket")) == "s3://bucket"
    assert RemoteURI("s3", "b", "").at("x").key == "x"
    assert RemoteURI("s3", "b", "a").at("").key == "a"
