"""Uploads killed at any request: the next one leaves nothing of them, ``wmtp clean`` finds the rest, and others' work stays."""

import json
import random
import signal
import subprocess
import sys

import pytest

from wmtp.cli import main
from wmtp_storage import S3Storage
from wmtp_storage.leftovers import INCOMPLETE, REPLACING

KB = 2**10
BEFORE = {"a": b"old a", "gone": b"old"}
AFTER = {"a": b"1" * 20 * KB, "large": random.Random(1).randbytes(17 * KB * KB), "sub/c": b"3"}


@pytest.fixture
def bucket(s3):
    return s3.bucket()


@pytest.fixture
def folder(tmp_path):
    for name, content in AFTER.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(content)
    return tmp_path / "m"


def keys(s3, bucket):
    return sorted(each["Key"] for each in s3.client().list_objects_v2(Bucket=bucket).get("Contents", []))


def unfinished(s3, bucket):
    return sorted(each["Key"] for each in s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []))


def killed_at(faulty, number, path, uri):
    """``wmtp push`` in a process that is killed when its so many-th writing request reaches the store; and the proxy."""
    proxy, running, writes = faulty(()), [], []
    choose = proxy._choose

    def kill(method, where):
        if method != "GET" and method != "HEAD":
            writes.append(where)
            if len(writes) == number:
                running[0].kill()
                running[0].wait()
        return choose(method, where)

    proxy._choose = kill
    sets = ("--set", f"storage.s3.endpoint={proxy.endpoint}", "--set", "storage.s3.region=us-east-1")
    running.append(subprocess.Popen([sys.executable, "-m", "wmtp", "push", str(path), uri, *sets], stderr=subprocess.PIPE))
    _, said = running[0].communicate(timeout=300)
    assert running[0].returncode in (0, -signal.SIGKILL), said
    return proxy, running[0].returncode != 0


def pushed_through(proxy, path, uri):
    S3Storage(endpoint=proxy.endpoint, region="us-east-1").build().push(path, uri)


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *(("new", 6), ("replaced", 10), ("file", 3)),
        *(pytest.param(kind, n, marks=pytest.mark.slow) for kind in ("new", "replaced", "file") for n in range(1, 16)),
    ],
)
def test_the_next_push_leaves_nothing_of_a_killed_one(faulty, s3, bucket, folder, kind, number):
    others = ["a.partial-0123456789abcdef/x", "m.partial-x/y", "m2/large"]
    for key in others:
        s3.client().put_object(Bucket=bucket, Key=key, Body=b"1")
    s3.client().create_multipart_upload(Bucket=bucket, Key="m2/large")
    uri, path = f"s3://{bucket}/m", folder
    if kind == "file":
        uri, path = f"{uri}/large", folder / "large"
    for key, content in BEFORE.items() if kind == "replaced" else ():
        s3.client().put_object(Bucket=bucket, Key=f"m/{key}", Body=content)
    proxy, was_killed = killed_at(faulty, number, path, uri)
    pushed_through(proxy, path, uri)
    assert keys(s3, bucket) == sorted([*others, *(["m/large"] if kind == "file" else [f"m/{name}" for name in AFTER])])
    assert unfinished(s3, bucket) == ["m2/large"]
    assert was_killed or number > {"new": 8, "replaced": 13, "file": 5}[kind]


@pytest.mark.slow
def test_two_pushes_to_one_place_come_one_after_the_other(faulty, s3, bucket, folder):
    """Each copies its files into the folder at the end: together they would mix two versions."""
    for key, content in BEFORE.items():
        s3.client().put_object(Bucket=bucket, Key=f"m/{key}", Body=content)
    uri, proxy = f"s3://{bucket}/m", faulty(())
    sets = ("--set", f"storage.s3.endpoint={proxy.endpoint}", "--set", "storage.s3.region=us-east-1")
    command = [sys.executable, "-m", "wmtp", "push", str(folder), uri, *sets]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [each.communicate(timeout=300)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    stagings = [
        path.partition("?")[0].split("/")[2] for method, path in proxy.requests if ".partial-" in path and method == "PUT"
    ]
    assert len(set(stagings)) == 2
    assert stagings == sorted(stagings, key=stagings.index), "the second began when the first had ended"
    assert keys(s3, bucket) == [f"m/{name}" for name in AFTER]


def cleaned(uri, *words, capsys):
    assert main(["clean", uri, "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)["leftovers"]
    return sorted((each["uri"].partition("://")[2].partition("/")[2], each["kind"], each["is_removable"]) for each in found)


def test_clean_removes_what_killed_uploads_left_and_nothing_else(s3, bucket, capsys):
    whole = [f"c/m.partial-1/{INCOMPLETE}x", "c/whole/x", "d/x"]
    left = [
        *(f"c/deep/half/{INCOMPLETE}", "c/deep/half/x/y", "c/m.partial-0123456789abcdef/x"),
        *("c.partial-0123456789abcdef/x", f"c.partial-0123456789abcdef/y/{INCOMPLETE}"),
    ]
    for key in (*whole, *left, "c/replaced/x"):
        s3.client().put_object(Bucket=bucket, Key=key, Body=b"1")
    s3.client().put_object(Bucket=bucket, Key=f"c/replaced/{INCOMPLETE}", Body=REPLACING)
    for key in ("c/x", "c/deep/half/z", "c2/x"):
        s3.client().create_multipart_upload(Bucket=bucket, Key=key)
    uri = f"s3://{bucket}/c"
    there, begun = keys(s3, bucket), unfinished(s3, bucket)
    assert cleaned(uri, capsys=capsys) == [], "younger than a day: somebody may be at work"
    expected = [
        ("c.partial-0123456789abcdef", "folder of an unfinished replacement", True),
        ("c/deep/half", "half-written folder", True),
        ("c/deep/half/z", "unfinished upload", True),
        ("c/m.partial-0123456789abcdef", "folder of an unfinished replacement", True),
        ("c/replaced", "half-replaced folder", False),
        ("c/x", "unfinished upload", True),
    ]
    assert cleaned(uri, "--older-than", "0", "--dry-run", capsys=capsys) == expected
    assert (keys(s3, bucket), unfinished(s3, bucket)) == (there, begun)
    assert cleaned(uri, "--older-than", "0", capsys=capsys) == expected
    assert keys(s3, bucket) == sorted([*whole, "c/replaced/x", f"c/replaced/{INCOMPLETE}"])
    assert unfinished(s3, bucket) == ["c2/x"]
    assert main(["clean", uri, "--older-than", "0s"]) == 0
    assert "c/replaced: half-replaced folder, " in (said := capsys.readouterr().out)
    assert "stays, since it held files before: upload it again" in said


def test_clean_without_leftovers_and_with_a_wrong_time(bucket, capsys):
    assert main(["clean", f"s3://{bucket}/c"]) == 0
    assert "nothing is left of killed uploads that is older than 24 h" in capsys.readouterr().out
    assert main(["clean", f"s3://{bucket}/c", "--older-than", "soon"]) == 2
    assert "'soon' is no time; write, for instance, 24h, 90m or 7d" in capsys.readouterr().err


def test_a_live_upload_of_a_large_file_is_not_a_leftover(s3, bucket, capsys):
    """The mark is old, the upload inside young, or the other way round: the younger of both counts."""
    s3.client().put_object(Bucket=bucket, Key=f"c/m/{INCOMPLETE}", Body=b"1")
    s3.client().create_multipart_upload(Bucket=bucket, Key="c/m/large")
    assert cleaned(f"s3://{bucket}", "--older-than", "1h", capsys=capsys) == []
