"""Uploads that fail or are killed at any step: what is there afterwards is whole, as it was, or refused."""

import contextlib

import pytest

from wmtp.errors import WMTPError
from wmtp.storage.manifest import MANIFEST, Manifest
from wmtp_storage import S3Storage
from wmtp_storage.leftovers import INCOMPLETE

STORAGE = S3Storage().build()


@pytest.fixture
def bucket(s3):
    return s3.bucket()


@pytest.fixture
def folder(tmp_path):
    """A folder with a link to another folder in it, as the caches of models have them."""
    (tmp_path / "m/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name, data in {"m/a": b"1", "m/b": b"2", "m/sub/c": b"3", "elsewhere/d": b"4"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "m/linked").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "m"


NAMES = ["a", "b", "linked/d", "sub/c"]


def keys(s3, bucket):
    return sorted(each["Key"] for each in s3.client().list_objects_v2(Bucket=bucket).get("Contents", []))


def through(proxy):
    return S3Storage(endpoint=proxy.endpoint, region="us-east-1", retry_timeout=0).build()


def test_a_folder_and_then_another_in_its_place(bucket, s3, folder):
    STORAGE.push(folder, f"s3://{bucket}/x/m")
    assert keys(s3, bucket) == [f"x/m/{name}" for name in NAMES]
    (folder / "b").unlink()
    (folder / "new").write_bytes(b"5")
    STORAGE.push(folder, f"s3://{bucket}/x/m")
    assert keys(s3, bucket) == ["x/m/a", "x/m/linked/d", "x/m/new", "x/m/sub/c"], "nothing old, nothing of the work beside it"
    STORAGE.push(folder, f"s3://{bucket}")
    assert keys(s3, bucket) == ["a", "linked/d", "new", "sub/c"], "the bucket is the folder that was replaced"


def test_a_new_folder_that_failed_leaves_nothing(bucket, s3, folder, refusing):
    for after in range(1, 5):
        with pytest.raises(WMTPError, match=f"nothing is at s3://{bucket}/m"):
            through(refusing(403, "AccessDenied", "no", after=after, only="PUT")).push(folder, f"s3://{bucket}/m")
        assert keys(s3, bucket) == []


@pytest.mark.parametrize("after", range(3, 8))
def test_a_new_folder_whose_upload_was_cut_off_is_not_read(bucket, s3, folder, refusing, tmp_path, after):
    """From one moment on nothing goes through, neither uploads nor what would clean up."""
    with pytest.raises(WMTPError):
        through(refusing(403, "AccessDenied", "no", after=after)).push(folder, f"s3://{bucket}/m")
    there = keys(s3, bucket)
    if there and there != [f"m/{name}" for name in NAMES]:
        assert f"m/{INCOMPLETE}" in there
        with pytest.raises(WMTPError, match="the folder is half-written"):
            STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    STORAGE.push(folder, f"s3://{bucket}/m")
    assert keys(s3, bucket) == [f"m/{name}" for name in NAMES]


@pytest.mark.parametrize("after", range(2, 24, 3))
def test_a_folder_whose_replacement_was_cut_off_is_the_old_one_or_is_not_read(bucket, s3, folder, refusing, tmp_path, after):
    STORAGE.push(folder, f"s3://{bucket}/m")
    for name in NAMES:
        (folder / name).write_bytes(b"new")
    with contextlib.suppress(WMTPError):
        through(refusing(403, "AccessDenied", "no", after=after)).push(folder, f"s3://{bucket}/m")
    if f"m/{INCOMPLETE}" in keys(s3, bucket):
        with pytest.raises(WMTPError, match="the folder is half-written"):
            STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    else:
        STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
        content = {(tmp_path / "out" / name).read_bytes() == b"new" for name in NAMES}
        assert len(content) == 1, "old and new are mixed"
    STORAGE.push(folder, f"s3://{bucket}/m")
    STORAGE.tidy(f"s3://{bucket}")
    assert keys(s3, bucket) == [f"m/{name}" for name in NAMES]
    STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    assert {(tmp_path / "out" / name).read_bytes() for name in NAMES} == {b"new"}


def test_a_file_and_a_folder_do_not_replace_each_other(bucket, s3, folder):
    STORAGE.push(folder / "a", f"s3://{bucket}/file")
    STORAGE.push(folder, f"s3://{bucket}/folder")
    before = keys(s3, bucket)
    with pytest.raises(WMTPError, match="an object is there; remove it, or write another name"):
        STORAGE.push(folder, f"s3://{bucket}/file")
    with pytest.raises(WMTPError, match=f"a folder is there; write the file's name too: s3://{bucket}/folder/a"):
        STORAGE.push(folder / "a", f"s3://{bucket}/folder")
    assert keys(s3, bucket) == before


def test_tidy_removes_what_was_never_whole_and_nothing_else(bucket, s3, folder):
    whole = ["c/my.partial-1/x", f"c/whole/s/{INCOMPLETE}x", "c/whole/x"]
    for key in (f"c/half/{INCOMPLETE}", "c/half/x", "c/m.partial-0123456789abcdef/x", *whole):
        s3.client().put_object(Bucket=bucket, Key=key, Body=b"1")
    unfinished = {"c/x", "c2/x", "other"}
    for key in unfinished:
        s3.client().create_multipart_upload(Bucket=bucket, Key=key)
    STORAGE.tidy(f"s3://{bucket}/c")
    assert keys(s3, bucket) == whole
    left = {each["Key"] for each in s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])}
    assert left == unfinished - {"c/x"}, "of this folder alone"


def test_unfinished_uploads_that_cannot_be_aborted(bucket, s3, refusing, caplog):
    s3.client().create_multipart_upload(Bucket=bucket, Key="c/x")
    with pytest.raises(WMTPError, match="c/x: an unfinished upload could not be aborted: HTTP status 403"):
        through(refusing(403, "AccessDenied", "no", only="DELETE")).tidy(f"s3://{bucket}/c")
    storage = through(refusing(403, "AccessDenied", "no", after=1, only="GET"))  # the listing, and not the question for uploads
    storage.tidy(f"s3://{bucket}/c")
    assert "unfinished uploads of killed runs, if there are any, stay" in caplog.text
    STORAGE.tidy(f"s3://{bucket}/c")
    assert not s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_a_folder_that_was_fetched_goes_up_and_comes_back_without_its_manifest(bucket, s3, folder, tmp_path):
    s3.client().put_object(Bucket=bucket, Key=f"m/{MANIFEST}", Body=b"of somebody else")
    STORAGE.push(folder, f"s3://{bucket}/m")
    s3.client().put_object(Bucket=bucket, Key=f"m/{MANIFEST}", Body=b"of somebody else")
    STORAGE.fetch(f"s3://{bucket}/m", tmp_path / "out")
    assert [file.name for file in Manifest.read(tmp_path / "out" / MANIFEST).files] == NAMES
