"""A store that refuses, from the beginning or in the middle of a transfer, with the answers of Amazon's S3."""

import json
import random

import pytest

from wmtp.cli import main
from wmtp.errors import WMTPError
from wmtp.storage.manifest import MANIFEST
from wmtp_storage import S3Storage
from wmtp_storage.journal import read_journal

KB = 2**10
#: status, code and message as Amazon's servers send them, and what a user reads
REFUSALS = {
    "expired": (400, "ExpiredToken", "The provided token has expired.", "the credentials have expired .*renew them"),
    "skewed": (
        403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large.",
        "this machine's clock is wrong",
    ),
    "key": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist.", "the credentials are wrong"),
    "secret": (403, "SignatureDoesNotMatch", "The request signature does not match.", "the credentials are wrong"),
    "denied": (403, "AccessDenied", "Access Denied", r"permission denied \(AccessDenied: Access Denied\)"),
    "region": (
        400, "AuthorizationHeaderMalformed", "The authorization header is malformed; the region 'us-east-1' is wrong;"
        " expecting 'eu-west-1'", r"the bucket is in another region .*expecting 'eu-west-1'",
    ),
    "moved": (
        301, "PermanentRedirect", "The bucket you are attempting to access must be addressed using the specified endpoint.",
        "the bucket is in another region.*remove storage.s3.region, or correct it",
    ),
}  # fmt: skip


@pytest.fixture
def model(s3):
    bucket = s3.bucket()
    for name, size in {"large": 700 * KB, "small": 100}.items():
        s3.store(bucket).put(f"m/{name}", random.Random(1).randbytes(size))
    return f"s3://{bucket}/m"


def storage(proxy, **options):
    return S3Storage(
        endpoint=proxy.endpoint, region="us-east-1", **{"chunk_size": 16 / 1024, "max_connections": 2} | options
    ).build()


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_from_the_beginning(refusing, model, tmp_path, name):
    status, code, message, said = REFUSALS[name]
    proxy = refusing(status, code, message)
    (tmp_path / "x").write_text("")
    for ask in (
        lambda: storage(proxy).fetch(model, tmp_path / "out"),
        lambda: storage(proxy).fetch(f"{model}/large", tmp_path / "out"),
        lambda: storage(proxy).localize(model, tmp_path / "cache"),
        lambda: storage(proxy).push(tmp_path / "x", f"{model}/x"),
        lambda: storage(proxy).remove(f"{model}/x"),
    ):
        with pytest.raises(WMTPError, match=said) as caught:
            ask()
        assert model in str(caught.value)
    assert len(proxy.requests) < 20, "what is refused is not asked again and again"


@pytest.mark.parametrize("name", ["expired", "denied", "skewed"])
@pytest.mark.parametrize("after", [4, 9, 20])
def test_refused_in_the_middle(refusing, model, tmp_path, name, after):
    """Received bytes are kept, no file has its name yet, and the same command goes on once it is allowed to."""
    status, code, message, said = REFUSALS[name]
    proxy = refusing(status, code, message, after=after)
    with pytest.raises(WMTPError, match=said):
        storage(proxy).fetch(model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".wmtp-fetch"}
    kept = read_journal(tmp_path / "out/.wmtp-fetch/journal")
    there = sum(segment.end - segment.start for state in kept.values() for segment in state.segments)
    assert there > 0
    done = S3Storage().build().fetch(model, tmp_path / "out")
    assert done.transferred == done.size - there
    assert (tmp_path / "out" / MANIFEST).exists()


def test_the_command_says_so_in_one_line(refusing, model, tmp_path, capsys):
    proxy = refusing(*REFUSALS["expired"][:3], after=9)
    words = ("fetch", model, str(tmp_path / "out"), "--json")
    sets = (f"storage.s3.endpoint={proxy.endpoint}", "storage.s3.chunk_size=0.02", "storage.s3.max_connections=1")
    assert main([*words, *(part for word in sets for part in ("--set", word))]) == 1
    printed, said = capsys.readouterr()
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {model}/large could not be read: the credentials have expired (ExpiredToken: The provided")
    assert line.endswith("renew them, and run it again: it continues")
    assert json.loads(printed)["problems"] == [line.removeprefix("error: ")]


def test_checksums_that_may_not_be_asked_for(s3, refusing, tmp_path):
    """The HEADs of large objects are refused: that the file was not compared is no detail."""
    bucket = s3.bucket()
    s3.store(bucket).put("large", bytes(9 * 2**20), use_multipart=False)

    proxy = refusing(403, "", "", after=1, only="HEAD")
    with pytest.raises(WMTPError, match=r"large: its checksum could not be asked for: HTTP status 403"):
        storage(proxy, chunk_size=32).fetch(f"s3://{bucket}/large", tmp_path / "out")
    assert S3Storage().build().fetch(f"s3://{bucket}/large", tmp_path / "out").files == 1


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")])
def test_what_is_busy_is_asked_again_for_a_time(refusing, model, tmp_path, status, code):
    """Each request is tried again for ``retry_timeout``; what comes back in time is not even mentioned."""
    proxy = refusing(status, code, "wait", after=6, most=2)
    assert storage(proxy, retry_timeout=300, max_connections=1).fetch(model, tmp_path / "out").files == 2
    assert proxy.refused == 2
    proxy = refusing(status, code, "wait")
    with pytest.raises(WMTPError, match=rf"m could not be read: HTTP status {status}"):
        storage(proxy, retry_timeout=0.3).exists(model)
    assert 2 <= len(proxy.requests) < 60, "the HEAD, and the question why it failed"
    proxy = refusing(status, code, "wait", after=4)
    with pytest.raises(WMTPError, match=rf"could not be read: .*{code}: wait; given up after \d+ tries in .*run it again"):
        storage(proxy, retry_timeout=0.3, max_connections=1).fetch(model, tmp_path / "other")


def test_so_long_and_no_longer(refusing, model, tmp_path):
    proxy = refusing(503, "SlowDown", "wait", after=4)
    with pytest.raises(WMTPError, match=r"given up after \d+ tries"):
        storage(proxy, retry_timeout=0.3, max_connections=1).fetch(model, tmp_path / "out")
    assert 0 < proxy.refused < 20
