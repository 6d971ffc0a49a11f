import os
from pathlib import Path

import pytest

from wmtp.errors import ConfigError, WMTPError
from wmtp.plugins import Registry
from wmtp.plugins.loader import load_plugins
from wmtp.redaction import redact
from wmtp.storage import backend_for, localize, uris
from wmtp.storage.config import FileStorage
from wmtp.storage.uris import file_path, local_path, scheme_of

BACKENDS = {"file": FileStorage().build()}


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/a/b", "/a/b"),
        ("/a b/ü%20", "/a b/ü%20"),
        ("file:///a/b", "/a/b"),
        ("FILE:///a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("file://localhost/a/b", "/a/b"),
        ("file:///a%20b/%C3%BC%25", "/a b/ü%"),
        ("file:///a/b/", "/a/b"),
        ("/a/x:y", "/a/x:y"),
        ("/", "/"),
    ],
)
def test_file_path(uri, path):
    assert file_path(uri) == Path(path)


def test_every_path_survives_as_uri(tmp_path):
    for name in ["a b", "ü", "100%", "q?", "c#", "%41", os.fsdecode(b"\xff")]:
        assert file_path((tmp_path / name).as_uri()) == tmp_path / name
        assert file_path(str(tmp_path / name)) == tmp_path / name


def test_home_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    assert file_path("~/x") == Path("/home/ada/x")
    assert file_path("~") == Path("/home/ada")
    assert file_path("x/y") == tmp_path / "x/y"
    assert file_path("./~x") == tmp_path / "~x"
    assert file_path("batch:1/x") == tmp_path / "batch:1/x"


def test_dots_follow_links_as_the_system_does(tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "far/data").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    assert file_path(f"{tmp_path}/link/../data").read_text() == "1"
    assert file_path((tmp_path / "link").as_uri() + "/../data").read_text() == "1"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("file://data/x", "file:///data/x"),
        ("file:data/x", "file:///PATH"),
        ("file://", "file:///PATH"),
        ("file:///a?b", "%3F"),
        ("file:///a#b", "%23"),
        ("file:///100%", "%25"),
        ("file:///a%00b", "NUL"),
        ("a\0b", "NUL"),
        ("a" * 256, "is longer than a path can be"),
        ("\u00e9" * 128, "is longer than a path can be"),
        ("a/" * 2048, "is longer than a path can be"),
        ("~no-such-user-here/x", "no such user"),
        ("s3://me:secret@", "no installed plugin serves s3:// URIs"),
        ("S3://bucket/key", "no installed plugin serves s3:// URIs; installed: file://"),
        ("ftp://x/y", "no installed plugin serves ftp:// URIs; installed: file://"),
    ],
)
def test_wrong_uri(uri, says):
    with pytest.raises(ConfigError) as error:
        backend_for(uri, BACKENDS, key="models.base.uri")
    assert says in str(error.value)
    assert str(error.value).startswith("models.base.uri: ")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("uri", ["s3:bucket/key", "S3:/bucket/key"])
def test_missing_slashes_are_a_mistake_only_where_a_backend_serves_the_scheme(uri):
    backends = {**BACKENDS, "s3": FileStorage().build()}
    with pytest.raises(ConfigError, match=r"is no URI; write 's3://bucket/key'"):
        backend_for(uri, backends)
    assert backend_for(uri, BACKENDS) is BACKENDS["file"], "a colon is legal in a file's name"


def test_the_package_that_has_more_backends_is_named_where_it_is_missing(monkeypatch):
    installed = load_plugins()
    core = [plugin for plugin in installed.plugins if plugin.distribution == "wmtp-core"]
    monkeypatch.setattr(uris, "load_plugins", lambda: Registry(core, installed.components))
    with pytest.raises(ConfigError, match=r"serves s3:// URIs; .*; the package wmtp-storage has storage backends: pip install"):
        backend_for("s3://bucket/key", BACKENDS)


def test_backend_by_scheme():
    other = FileStorage().build()
    backends = {**BACKENDS, "s3": other}
    assert backend_for("s3://b/k", backends) is other
    assert backend_for("S3://b", backends) is other
    assert backend_for("x/y", backends) is BACKENDS["file"]
    assert scheme_of("Custom+1://x") == "custom+1"


def test_localize_gives_the_path_itself(tmp_path):
    (tmp_path / "ü x").write_text("1")
    cache = tmp_path / "cache"
    assert localize((tmp_path / "ü x").as_uri(), BACKENDS, cache) == tmp_path / "ü x"
    assert not cache.exists()


def test_missing_file_is_named_and_what_exists(tmp_path):
    uri = f"{tmp_path}/no/such/file.jsonl"
    with pytest.raises(WMTPError) as error:
        localize(uri, BACKENDS, tmp_path)
    assert not isinstance(error.value, ConfigError)
    assert uri in str(error.value)
    assert f"of that {tmp_path} exists" in str(error.value)


def test_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert not BACKENDS["file"].exists(str(tmp_path / "pipe"))
    with pytest.raises(WMTPError, match="is a named pipe, which is read once"):
        localize(str(tmp_path / "pipe"), BACKENDS, tmp_path)


def test_redact():
    assert redact("https://ada:s3cret@host:1/x?a=b@c") == "https://host:1/x"
    assert (
        redact("(see https://host/x?version=2&key=s3cret; then s3://b/y.)") == "(see https://host/x?version=2; then s3://b/y.)"
    )
    assert redact("s3:me:s3cret@b/x") == "s3:b/x"
    assert redact("https://host:8080/at@v1 https://me:pa/ss@host/x") == "https://host:8080/at@v1 https://host/x"
    assert redact("abfss://container@account.host/x") == "abfss://container@account.host/x"
    assert redact('Url { host: "h", query: Some("sig=s3cret") }') == 'Url { host: "h", query: Some("") }'
    assert redact("/plain/ada:x@y") == "/plain/ada:x@y"


def test_a_tilde_after_a_dot_is_no_home():
    assert local_path("./~nobody/x") == Path("~nobody/x")
    assert local_path("~/x") == Path.home() / "x"
