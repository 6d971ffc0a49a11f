"""Odd contents of a store, and odd requests of users, that must end well."""

import functools
import http.server

import pytest
from small_server import Answers, serving

from wmtp.errors import ConfigError, WMTPError
from wmtp.storage.manifest import MANIFEST, Manifest, verify
from wmtp_storage import HTTPStorage, S3Storage

STORAGE = S3Storage(retry_timeout=0.5).build()


@pytest.fixture
def bucket(s3):
    return s3.bucket()


@pytest.fixture
def put(s3, bucket):
    """Puts objects by another client than ours: some keys are not such as obstore makes."""

    def put(**content):
        for key, data in content.items():
            s3.client().put_object(Bucket=bucket, Key=key, Body=data)

    return put


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}


def test_names_of_every_kind(bucket, put, tmp_path):
    names = ["with space", "ünï/cödé", "100%", "a#b?c", "star*", "[x]", "~", ".hidden", "quote'\"", "日本/語"]
    put(**{f"m/{name}": name.encode() for name in names})
    STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    assert files(tmp_path / "out") == {name: name.encode() for name in names}
    for name in names:
        from urllib.parse import quote

        assert STORAGE.localize(f"s3://{bucket}/m/{quote(name)}", tmp_path / "cache").read_bytes() == name.encode()


def test_markers_of_folders_are_no_files(bucket, put, tmp_path):
    put(**{"m/": b"", "m/sub/": b"", "m/sub/x": b"1", "m/alone/": b"", "m/empty": b""})
    STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    assert files(tmp_path / "out") == {"sub/x": b"1", "empty": b""}
    assert STORAGE.localize(f"s3://{bucket}/m/empty", tmp_path / "cache").read_bytes() == b""


def test_a_name_that_cannot_be_a_files(bucket, put, tmp_path):
    put(**{"m/tab\tname": b"1", "m/good": b"2"})
    with pytest.raises(WMTPError, match=r"s3://.*/m: the name 'tab\\tname' holds a control character; leave it out"):
        STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    assert not (tmp_path / "out/good").exists()


@pytest.mark.slow
def test_names_that_only_look_dangerous(bucket, put, tmp_path):
    names = [
        "%2e%2e/x",
        "..%2fx",
        "..x",
        "-rf",
        "$HOME",
        "`id`",
        " x ",
        "x.",
        "con",
        "🙂",
        "x" * 255,
        "B",
        "b",
        "e\u0301",
        "\u00e9",
    ]
    put(**{f"m/{name}": name.encode() for name in names} | {"m/.wmtp-fetch": b"1", "m/.wmtp-fetch/journal": b"2"})
    STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    assert files(tmp_path / "out") == {name: name.encode() for name in names}
    assert files(STORAGE.localize(f"s3://{bucket}/m", tmp_path / "cache")) == files(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "cache"}
    assert not list((tmp_path / "out").glob(".wmtp-fetch"))


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "./x", "a//x", "..", "a\\..\\x"])
def test_a_store_that_lists_names_outside_the_folder(bucket, put, faulty, tmp_path, name):
    """Amazon's servers take such names; this one does not, so the proxy says that it did."""
    put(**{"m/good": b"1", "m/replaced": b"2"})
    proxy = faulty((), edit=lambda path, content: content.replace(b"m/replaced", f"m/{name}".encode()))
    storage = S3Storage(endpoint=proxy.endpoint, region="us-east-1", retry_timeout=0).build()
    for fetch in (
        lambda: storage.fetch(f"s3://{bucket}/m", tmp_path / "out"),
        lambda: storage.localize(f"s3://{bucket}/m", tmp_path / "c"),
    ):
        with pytest.raises(WMTPError):
            fetch()
    there = [path for path in tmp_path.rglob("*") if path.is_file() and ".wmtp-fetch" not in path.parts]
    assert not [path for path in there if path.suffix != ".lock"], "nothing has its name, in the folder or outside"


def test_an_object_that_is_a_folder_too(bucket, put, faulty, tmp_path):
    """This server does not take such names, Amazon's do: the proxy says that it did."""
    put(**{"m/a": b"1", "m/b": b"2"})
    proxy = faulty((), edit=lambda path, content: content.replace(b"m/b<", b"m/a/b<"))
    storage = S3Storage(endpoint=proxy.endpoint, region="us-east-1", retry_timeout=0).build()
    with pytest.raises(WMTPError, match="m: 'a' is an object, and a folder too, for 'a/b'; no disk can hold both"):
        storage.fetch(f"s3://{bucket}/m", tmp_path / "out")
    storage.fetch(f"s3://{bucket}/m", tmp_path / "out", exclude=["a/*"])
    assert files(tmp_path / "out") == {"a": b"1"}


def test_names_that_this_disk_cannot_hold(bucket, put, tmp_path):
    put(**{"m/d/" + "y" * 256 + "/z": b"1", "m/a": b"2", "n/A": b"1", "n/a": b"2"})
    with pytest.raises(WMTPError, match=r"/m: the name 'd/yy.*/z' has a part of more than 255 bytes.*--exclude"):
        STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out", exclude=["d/*"])
    assert files(tmp_path / "out") == {"a": b"2"}
    # as if the disk knew no difference between large and small letters
    (tmp_path / "mac/.WMTP-FETCH").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"n has 'A' and 'a', which are the same name on the disk of"):
        STORAGE.fetch(f"s3://{bucket}/n", tmp_path / "mac")
    STORAGE.fetch(f"s3://{bucket}/n", tmp_path / "mac", exclude=["A"])
    assert files(tmp_path / "mac") == {"a": b"2"}


def test_what_is_not_there(bucket, put, s3, tmp_path):
    put(**{"models/llama-7b/x": b"1", "models/llama-13b/x": b"1", "other": b"1"})
    with pytest.raises(WMTPError, match=rf"s3://{bucket}/models/lama-7b: nothing is there; in .*/models there is: llama-7b"):
        STORAGE.fetch(f"s3://{bucket}/models/lama-7b", tmp_path / "out")
    with pytest.raises(WMTPError, match=r"nothing is there; in .* there is: models"):
        STORAGE.localize(f"s3://{bucket}/modells/", tmp_path / "cache")
    with pytest.raises(WMTPError, match=r"s3://no-such-bucket/x could not be listed: there is no such bucket"):
        STORAGE.fetch("s3://no-such-bucket/x", tmp_path / "out")
    with pytest.raises(WMTPError, match="the bucket is empty"):
        STORAGE.fetch(f"s3://{s3.bucket()}", tmp_path / "out")
    with pytest.raises(WMTPError, match="nothing there matches the patterns"):
        STORAGE.fetch(f"s3://{bucket}/models", tmp_path / "out", include=["*.safetensors"])
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out").keys() - {".wmtp-fetch/lock"}


def test_a_file_where_a_folder_should_be(bucket, put, tmp_path):
    put(**{"m/a/x": b"1", "m/b": b"2"})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file is a file; name a folder to fetch into"):
        STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("mine")
    with pytest.raises(ConfigError, match=r"out/a is a file, but .* has a folder of this name"):
        STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    (tmp_path / "other/b").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"other/b is a folder, but .* has a file of this name"):
        STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "other")
    assert (tmp_path / "out/a").read_text() == "mine"


def test_a_folder_that_is_half_uploaded_is_not_read(bucket, put, tmp_path):
    put(**{"m/x": b"1", "m/.wmtp-incomplete": b""})
    with pytest.raises(WMTPError, match="the folder is half-written"):
        STORAGE.localize(f"s3://{bucket}/m", tmp_path)


def test_a_fetch_brings_what_changed_and_keeps_what_is_the_users(bucket, put, s3, tmp_path):
    put(**{"m/x": b"1" * 1000, "m/y": b"2" * 1000, "m/z": b"3"})
    out = tmp_path / "out"
    assert STORAGE.fetch(f"s3://{bucket}/m", out).transferred == 2001
    (out / "mine").write_text("mine")
    put(**{"m/y": b"4" * 1000})
    assert STORAGE.fetch(f"s3://{bucket}/m", out).transferred == 1000
    (out / "x").write_bytes(b"1" * 999 + b"0")
    assert len(verify(out, Manifest.read(out / MANIFEST).files)) == 1
    assert STORAGE.fetch(f"s3://{bucket}/m", out).transferred == 1000
    assert files(out) == {"x": b"1" * 1000, "y": b"4" * 1000, "z": b"3", "mine": b"mine"}
    assert STORAGE.fetch(f"s3://{bucket}/m", out, include=["z"]).transferred == 0
    assert len(Manifest.read(out / MANIFEST).files) == 3


def test_the_cache_links_what_did_not_change(bucket, put, tmp_path, s3):
    put(**{"m/x": b"1" * 1000, "m/y": b"2" * 1000})
    first = STORAGE.localize(f"s3://{bucket}/m", tmp_path / "cache")
    assert STORAGE.localize(f"s3://{bucket}/m/", tmp_path / "cache") == first
    put(**{"m/y": b"3" * 1000})
    second = STORAGE.localize(f"s3://{bucket}/m", tmp_path / "cache")
    assert files(second) == {"x": b"1" * 1000, "y": b"3" * 1000}
    assert files(first)["y"] == b"2" * 1000, "a run that uses the old version keeps it"
    assert (first / "x").samefile(second / "x")


@pytest.fixture
def web(tmp_path):
    """Python's own web server: it gives whole files only, and lists nothing that we read."""
    (tmp_path / "web/sub").mkdir(parents=True)
    (tmp_path / "web/a b.bin").write_bytes(b"0123456789" * 100_000)
    (tmp_path / "web/sub/y").write_bytes(b"y")

    class Quiet(Answers, http.server.SimpleHTTPRequestHandler):
        pass

    with serving(functools.partial(Quiet, directory=tmp_path / "web")) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def test_a_web_server_without_ranges(web, tmp_path):
    storage = HTTPStorage(chunk_size=0.1, retry_timeout=0.1).build()
    done = storage.fetch(f"{web}/a%20b.bin?signature=1", tmp_path / "out")
    assert done.transferred == 1_000_000
    assert (tmp_path / "out/a b.bin").read_bytes() == b"0123456789" * 100_000
    assert storage.fetch(f"{web}/a%20b.bin", tmp_path / "out").transferred == 0
    assert storage.exists(f"{web}/sub/y")
    assert not storage.exists(f"{web}/no")
    with pytest.raises(WMTPError, match="nothing is there"):
        storage.fetch(f"{web}/sub/", tmp_path / "out2")


def test_a_folder_of_a_web_server_is_read_by_its_manifest(web, tmp_path):
    from wmtp.storage.manifest import ManifestFile, hash_file

    names = ("a b.bin", "sub/y")
    listed = tuple(
        ManifestFile(name=n, size=(tmp_path / "web" / n).stat().st_size, hash=hash_file(tmp_path / "web" / n, "crc64nvme"))
        for n in names
    )
    Manifest(uri="s3://b/m", files=listed).write(tmp_path / "web" / MANIFEST)
    storage = HTTPStorage().build()
    storage.fetch(f"{web}/", tmp_path / "out")
    assert set(files(tmp_path / "out")) == set(names)
    assert {file.checked for file in Manifest.read(tmp_path / "out" / MANIFEST).files} == {"crc64nvme"}
    for name in ("../outside", "/outside", "a/../../outside", "."):
        Manifest(uri="s3://b/m", files=(ManifestFile(name=name, size=1, hash="crc64nvme:0"),)).write(
            tmp_path / "web/sub" / MANIFEST
        )
        with pytest.raises(WMTPError, match=r"sub/.wmtp-manifest.json names .*which is no file in its folder"):
            storage.fetch(f"{web}/sub/", tmp_path / "outside-not")
        assert not (tmp_path / "outside").exists()
    (tmp_path / "web/sub" / MANIFEST).unlink()
    (tmp_path / "web/sub/y").write_bytes(b"z")
    with pytest.raises(WMTPError, match="sub/y: what was received does not match the store's checksum"):
        storage.fetch(f"{web}/", tmp_path / "again")
