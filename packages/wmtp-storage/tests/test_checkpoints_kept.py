"""Complete checkpoints in a store stay, whatever answers in the store's place."""

import os
import re

import pytest

import wmtp
from wmtp.checkpoints.local import Checkpoint
from wmtp.checkpoints.manifest import write_facts
from wmtp.checkpoints.remote import RemoteCheckpoints
from wmtp.errors import WMTPError
from wmtp_storage import S3Storage

SEEDS = range(int(os.environ.get("WMTP_FAULT_SEEDS", "12")))


@pytest.fixture
def place(s3):
    return f"s3://{s3.bucket()}/checkpoints/this-run"


def checkpoint(tmp_path, step):
    folder = tmp_path / "run" / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(bytes([step]) * 1000)
    write_facts(folder, step, {})
    (tmp_path / "run" / "metrics.jsonl").write_text(f"up to {step}\n")
    return Checkpoint(path=folder, step=step)


def through(proxy, place):
    return RemoteCheckpoints(S3Storage(endpoint=proxy.endpoint, region="us-east-1", retry_timeout=0).build(), place)


def clean(place):
    return RemoteCheckpoints(S3Storage().build(), place)


def is_whole(place, step, folder):
    return (clean(place).fetch(step, folder).path / "state").read_bytes() == bytes([step]) * 1000


@pytest.mark.parametrize("number", range(1, 7))
def test_one_page_among_the_answers(login_page, place, tmp_path, number):
    """Whichever listing it is: nothing that is complete is removed."""
    clean(place).upload(checkpoint(tmp_path, 1), tmp_path / "run", 0)
    asked = []

    def concerns(method, path):
        asked.extend([path] if "list-type" in path else [])
        return "list-type" in path and len(asked) == number

    remote = through(login_page(concerns=concerns), place)

    def rounds():
        while len(asked) < 2 * number:  # more than one round has fewer
            remote.tidy()

    with pytest.raises(WMTPError, match="a proxy or a login page"):
        rounds()
    assert clean(place).steps() == [1]
    assert is_whole(place, 1, tmp_path / "here")


@pytest.mark.parametrize("seed", SEEDS)
def test_pages_now_and_then(login_page, place, tmp_path, seed):
    remote = through(login_page(seed=seed, share=(0.05, 0.2, 0.5)[seed % 3]), place)
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    clean(place).upload(first, tmp_path / "run", 0)
    failed = []
    for act in (
        remote.tidy,
        lambda: remote.fetch(1, tmp_path / "there"),
        lambda: remote.upload(first, tmp_path / "run", 2),
        lambda: remote.upload(second, tmp_path / "run", 2),
        remote.tidy,
    ):
        try:
            act()
        except WMTPError as error:
            failed.append(str(error))
    assert not [line for line in failed if "nothing is there" in line]
    found = clean(place).steps()
    assert found in ([1], [1, 2])
    for step in found:
        assert is_whole(place, step, tmp_path / "here")
    clean(place).tidy()
    assert clean(place).steps() == found


def test_a_listing_that_lacks_the_marker(faulty, place, tmp_path):
    """As one of the time before it was written, out of a cache."""
    clean(place).upload(checkpoint(tmp_path, 1), tmp_path / "run", 0)

    def edit(path, content):
        lost = rb"<Contents><Key>[^<]*step-1\.json</Key>.*?</Contents>|<KeyCount>\d+</KeyCount>"
        return re.sub(lost, b"", content) if "list-type" in path else content

    proxy = faulty((), edit=edit)
    assert through(proxy, place).steps() == []
    with pytest.raises(
        WMTPError, match=r"the store lists step-1 without step-1\.json, which is there .* nothing of it was rem"
    ):
        through(proxy, place).tidy()
    assert is_whole(place, 1, tmp_path / "here")


def test_a_mark_that_is_no_longer_there(faulty, s3, place, tmp_path):
    """A listing out of a cache shows a folder as half-written which is whole by now."""
    clean(place).upload(checkpoint(tmp_path, 1), tmp_path / "run", 0)

    def edit(path, content):
        if "list-type" not in path:
            return content
        return re.sub(
            rb"(<Contents><Key>[^<]*step-1/)checkpoint\.json(</Key>.*?</Contents>)", rb"\1.wmtp-incomplete\2", content
        )

    through(faulty((), edit=edit), place).tidy()
    assert is_whole(place, 1, tmp_path / "here")


@pytest.mark.parametrize(
    "page", [b"<html>Log in</html>", b'{"error": "log in"}', b"[]", b"\xff\xfe", b'{"step": 1, "files": {"a": "x"}}']
)
def test_a_marker_that_is_none(s3, place, tmp_path, page):
    clean(place).upload(checkpoint(tmp_path, 1), tmp_path / "run", 0)
    bucket, _, key = place.removeprefix("s3://").partition("/")
    s3.store(bucket).put(f"{key}/step-1.json", page)
    with pytest.raises(WMTPError, match=r"step-1\.json is not what was uploaded: it begins with"):
        clean(place).fetch(1, tmp_path / "here")
    assert not list((tmp_path / "here").iterdir())


def test_what_is_there_whole_is_not_written_again(faulty, place, tmp_path):
    """While a folder is replaced it must not be read: a kill then would leave nothing to go on from."""
    first = checkpoint(tmp_path, 1)
    clean(place).upload(first, tmp_path / "run", 0)
    proxy = faulty(())
    through(proxy, place).upload(first, tmp_path / "run", 0)
    assert not [path for method, path in proxy.requests if method == "PUT" and "/step-1/" in path]
    (first.path / "state").write_bytes(b"longer" * 1000)
    (first.path / "checkpoint.json").unlink()
    write_facts(first.path, 1, {})
    through(proxy, place).upload(first, tmp_path / "run", 0)
    assert (clean(place).fetch(1, tmp_path / "here").path / "state").read_bytes() == b"longer" * 1000


def test_a_run_does_not_begin_anew_where_a_page_answers(login_page, place, tmp_path):
    """``resume = "auto"`` on a machine that has nothing yet."""
    clean(place).upload(checkpoint(tmp_path, 1), tmp_path / "run", 0)
    config = {
        "run": {"output_dir": str(tmp_path / "runs"), "name": "one"},
        "models": {"base": {"type": "scratch", "vocab_size": 258}},
        "tokenizer": {"type": "bytes"},
        "datasets": {"code": {"type": "python-source"}},
        "data": {"train": {"max_length": 64}},
        "trainer": {"type": "baseline-mtp"},
        "optimizer": {"type": "adamw", "lr": 1e-3},
        "train": {"max_steps": 1},
        "tracker": {"type": "jsonl"},
        "checkpoints": {"uri": place},
        "storage": {"s3": {"endpoint": login_page().endpoint, "region": "us-east-1", "retry_timeout": 0}},
    }
    with pytest.raises(WMTPError, match="a proxy or a login page"):
        wmtp.run(config, resume="auto")
    assert not (tmp_path / "runs/one").exists()
