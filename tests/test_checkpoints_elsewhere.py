"""Checkpoints in an object store: a real S3 server, runs in processes of their own, killed and taken up on another machine."""

import json
import os
import shutil
import signal
import time

import pytest
from conftest import HELD

import wmtp
from wmtp.checkpoints.local import Checkpoint
from wmtp.checkpoints.manifest import write_facts
from wmtp.checkpoints.remote import CheckpointUpload, RemoteCheckpoints
from wmtp.errors import WMTPError
from wmtp.storage.file import File
from wmtp_storage import S3Storage
from wmtp_storage.testing import s3_server

__all__ = ["s3_server"]


@pytest.fixture
def place(s3_server, monkeypatch):
    """An empty folder in a bucket, and how a process finds it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket()}/checkpoints/this-run"


def names(storage, uri):
    """Names directly in a folder."""
    return sorted({file.name.partition("/")[0] for file in storage.files(uri)})


def losses(run_dir):
    return [(row["step"], row["loss"]) for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())]


def test_a_run_goes_on_on_another_machine_bit_for_bit(recipe, wmtp, preloaded, place, tmp_path):
    """Machine A is killed in the middle of training. Machine B has nothing but the recipe and the URI."""
    uri = f"checkpoints.uri={place}"
    whole = wmtp("run", recipe, "--run-name", "whole", "--json", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    words = ["run", recipe, "--run-name", "one", "--set", uri, "--set", "checkpoints.keep_last=1"]
    storage = S3Storage().build()
    with (tmp_path / "log").open("w") as log:
        options = {"code": HELD, "stdout": log, "stderr": log, "cwd": tmp_path}
        first = preloaded.start(12, *words, "--set", f"run.output_dir={tmp_path}/a", **options)
        while not RemoteCheckpoints(storage, place).steps():
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    second = wmtp(*words, "--set", f"run.output_dir={tmp_path}/b", "--resume", "auto", "--json", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "begun elsewhere" in second.stderr
    ours, reference = tmp_path / "b" / "one", tmp_path / "runs" / "whole"
    assert losses(ours) == losses(reference)
    for name in ("model.safetensors", "mtp_heads.safetensors"):
        assert (ours / "model" / name).read_bytes() == (reference / "model" / name).read_bytes()
    assert names(storage, place) == ["model", "run", "step-40", "step-40.json"]
    assert (storage.localize(f"{place}/model", tmp_path / "cache") / "model.safetensors").read_bytes() == (
        reference / "model" / "model.safetensors"
    ).read_bytes()

    again = wmtp(*words, "--set", f"run.output_dir={tmp_path}/c", cwd=tmp_path)
    assert again.returncode == 2
    assert f"{place} holds checkpoints of another run" in again.stderr
    assert not (tmp_path / "c" / "one").exists()

    other = wmtp(*words, "--set", f"run.output_dir={tmp_path}/d", "--set", "optimizer.lr=1", "--resume", "auto", cwd=tmp_path)
    assert other.returncode == 2
    assert "optimizer.lr" in other.stderr


def run_until(preloaded, words, run_dir, steps):
    """Start a run, and end it by SIGTERM after some steps."""
    process = preloaded.start(steps, *words, code=HELD)
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= steps):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err


def test_a_machine_that_had_an_earlier_part_of_the_run_gets_the_whole_curve(recipe, wmtp, preloaded, place, tmp_path):
    """The run went from machine B to A and back: the steps of A were missing from the curve."""
    words = ["run", recipe, "--run-name", "one", "--resume", "auto", "--set", f"checkpoints.uri={place}"]
    words += ["--set", "train.max_steps=60", "--set", "checkpoints.save_interval=1000"]
    a, b = ([*words, "--set", f"run.output_dir={tmp_path}/{name}"] for name in "ab")
    run_until(preloaded, b, tmp_path / "b/one", 5)
    run_until(preloaded, a, tmp_path / "a/one", 25)
    last = wmtp(*b, "--json")
    assert last.returncode == 0, last.stderr
    assert [step for step, _ in losses(tmp_path / "b/one")] == list(range(1, 61))
    assert "lacks" not in last.stderr


def test_a_run_fails_loudly_if_its_last_checkpoint_did_not_arrive(recipe, wmtp, place, tmp_path):
    bucket = place.removeprefix("s3://").partition("/")[0]
    missing = f"s3://{bucket}-gone/run"
    words = ["run", recipe, "--run-name", "one", "--set", f"checkpoints.uri={missing}", "--set", "storage.s3.retry_timeout=0"]
    done = wmtp(*words, "--set", "train.max_steps=6", cwd=tmp_path)
    assert done.returncode == 1
    assert "no such bucket" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_waits_for_the_upload(recipe, preloaded, place, tmp_path):
    words = ["run", recipe, "--run-name", "one", "--set", f"checkpoints.uri={place}", "--set", "train.max_steps=100000"]
    run = preloaded.start(*words, "--set", "train.eval_interval=1000", cwd=tmp_path)
    storage = S3Storage().build()
    while not RemoteCheckpoints(storage, place).steps():
        assert run.poll() is None
        time.sleep(0.02)
    run.terminate()
    _, said = run.communicate(timeout=300)
    saved = max(int(path.name.partition("-")[2]) for path in (tmp_path / "runs/one/checkpoints").iterdir())
    assert f"step-{saved}.json" in names(storage, place), said


class Line(File):
    """Local files as a store, over a line that can be held up or cut."""

    def __init__(self):
        self.open = True
        self.broken: set[str] = set()

    def push(self, path, uri):
        while not self.open:
            time.sleep(0.005)
        if any(part in uri for part in self.broken):
            raise WMTPError(f"{uri}: the line is cut")
        super().push(path, uri)


@pytest.fixture
def line():
    return Line()


@pytest.fixture
def remote(line, tmp_path):
    return RemoteCheckpoints(line, (tmp_path / "store").as_uri())


def checkpoint(tmp_path, step):
    folder = tmp_path / "run" / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(os.urandom(1000))
    write_facts(folder, step, {})
    (tmp_path / "run" / "metrics.jsonl").write_text(f"up to {step}\n")
    return Checkpoint(path=folder, step=step)


def test_training_does_not_wait_and_waiting_checkpoints_make_way_for_newer_ones(line, remote, tmp_path):
    line.open = False
    upload = CheckpointUpload(remote, tmp_path / "run", keep_last=0)
    for step in range(1, 6):
        upload.put(checkpoint(tmp_path, step))
        while step == 1 and upload.needed != {1}:
            time.sleep(0.005)
        time.sleep(0.02)
    assert upload.needed == {1, 5}  # what is on its way and what will be must stay on the disk
    line.open = True
    upload.finish()
    assert remote.steps() == [1, 5]
    assert upload.needed == set()


def test_a_checkpoint_that_did_not_arrive_is_none_and_the_ones_before_stay(line, remote, tmp_path, caplog):
    remote.upload(checkpoint(tmp_path, 1), tmp_path / "run", 1)
    second = checkpoint(tmp_path, 2)
    for part in ("/step-2", "/run/", "step-2.json"):
        line.broken = {part}
        with pytest.raises(WMTPError, match="the line is cut"):
            remote.upload(second, tmp_path / "run", 1)
        assert remote.steps() == [1]
    line.broken = set()
    remote.tidy()
    assert names(line, remote.uri) == ["run", "step-1", "step-1.json"]
    fetched = remote.fetch(1, tmp_path / "here")
    assert (fetched.path / "state").read_bytes() == (tmp_path / "run/checkpoints/step-1/state").read_bytes()


def test_the_best_checkpoint_stays_in_the_store_until_a_better_one_is_there(line, remote, tmp_path):
    upload = CheckpointUpload(remote, tmp_path / "run", keep_last=1)

    def put(step, **best):
        upload.put(checkpoint(tmp_path, step), **best)
        while upload.needed:
            time.sleep(0.005)
        return remote.steps()

    assert [put(1, is_best=True), put(2), put(3)] == [[1], [1, 2], [1, 3]]
    assert [put(4, is_best=True), put(5)] == [[4], [4, 5]]
    upload.finish()
    # a machine that has nothing of it takes the run up: the best comes along, and stays
    there = tmp_path / "there"
    there.mkdir()
    again = CheckpointUpload(remote, tmp_path / "run", keep_last=1)
    again.restore_best(4, there)
    assert (there / "step-4/state").read_bytes() == (tmp_path / "run/checkpoints/step-4/state").read_bytes()
    again.put(checkpoint(tmp_path, 6))
    again.finish()
    assert remote.steps() == [4, 6]


@pytest.mark.slow
def test_a_run_keeps_its_best_in_s3_also_when_another_machine_takes_it_up(recipe, place, tmp_path):
    """The loss falls, so by mode "max" the first measurement, of step 3, is the best."""
    settings = [
        *("models.base.heads.warmup_steps=0", 'schedule={type="constant",warmup_steps=0}', "train.eval_interval=3"),
        *(
            "checkpoints.save_interval=2",
            'checkpoints.best="eval/loss"',
            'checkpoints.best_mode="max"',
            "checkpoints.keep_last=1",
        ),
        f'checkpoints.uri="{place}"',
    ]
    first = wmtp.run(recipe, run_name="a", overrides=[*settings, "train.max_steps=8"])
    store = S3Storage().build()
    assert [name for name in names(store, place) if name.endswith(".json")] == ["step-3.json", "step-8.json"]
    shutil.rmtree(first.run_dir.parent)
    second = wmtp.run(recipe, run_name="a", overrides=[*settings, "train.max_steps=10"], resume="auto")
    assert [name for name in names(store, place) if name.endswith(".json")] == ["step-10.json", "step-3.json"]
    wmtp.export(second.run_dir, tmp_path / "best", format="wmtp", checkpoint="best")
    assert "checkpoint of step 3" in (tmp_path / "best/README.md").read_text()


def test_only_the_newest_checkpoint_must_arrive(line, remote, tmp_path, caplog):
    upload = CheckpointUpload(remote, tmp_path / "run", keep_last=1)
    line.broken = {"step-1"}
    upload.put(checkpoint(tmp_path, 1))
    while upload.needed:
        time.sleep(0.005)
    line.broken = set()
    upload.put(checkpoint(tmp_path, 2))
    upload.finish()
    assert remote.steps() == [2]

    upload = CheckpointUpload(remote, tmp_path / "run", keep_last=1)
    line.broken = {"step-3"}
    upload.put(checkpoint(tmp_path, 3))
    with pytest.raises(WMTPError, match=r"step-3 was not uploaded to file:.*the line is cut"):
        upload.finish()
    assert remote.steps() == [2]


def test_another_content_than_was_uploaded_is_refused(line, remote, tmp_path):
    remote.upload(checkpoint(tmp_path, 1), tmp_path / "run", 1)
    (tmp_path / "store" / "step-1" / "state").write_bytes(b"cut")
    with pytest.raises(WMTPError, match=r"step-1 is not what was uploaded"):
        remote.fetch(1, tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_checkpoint_that_was_damaged_in_the_store_is_refused_by_its_uri(line, remote, tmp_path):
    remote.upload(checkpoint(tmp_path, 1), tmp_path / "run", 0)
    stored = tmp_path / "store/step-1/state"
    content = bytearray(stored.read_bytes())
    content[500] ^= 1
    stored.write_bytes(content)
    with pytest.raises(WMTPError) as error:
        remote.fetch(1, tmp_path / "here")
    uri = f"{remote.uri}/step-1"
    assert str(error.value).startswith(
        f"{uri} is damaged: state: its content was changed or damaged; remove {uri}.json to resume from"
    )
    assert not list((tmp_path / "here").glob("step-*"))


def test_uploads_that_were_killed_are_aborted(s3_server, place):
    """Their parts are invisible, and paid for."""
    bucket, _, folder = place.removeprefix("s3://").partition("/")
    client = s3_server.client()
    for key in (f"{folder}/step-1/state", "elsewhere/object"):
        started = client.create_multipart_upload(Bucket=bucket, Key=key)
        client.upload_part(Bucket=bucket, Key=key, UploadId=started["UploadId"], PartNumber=1, Body=b"x" * 100)
    RemoteCheckpoints(S3Storage().build(), place).tidy()
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["elsewhere/object"]
