"""Runs of Weights & Biases that are kept offline, read back from wandb's own files. No network is used."""

import json
import struct
import time
from importlib.util import find_spec

import pytest

from wmtp.errors import WMTPError
from wmtp.testing import TrackerTests
from wmtp.tracking import RunInfo
from wmtp.tracking.config import WandbTracker

# not imported before a test needs it: that takes seconds
pytestmark = pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
_BLOCK = 32768


def records(file):
    """Every record of a .wandb file: a header of 7 bytes, then blocks of chunks in the layout of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if place + 7 + length > len(content):
            return
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def whole(file):
    """All records of a run that has ended: wandb's own process may still be writing them when `finish` returns."""
    for _ in range(6000):
        read = list(records(file))
        if read and read[-1].WhichOneof("record_type") == "exit":
            return read
        time.sleep(0.01)
    raise AssertionError(f"{file}: no end after {len(read)} records")


def rows(run):
    """Read the history of the run, over all its attempts."""
    for file in sorted(run.run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in whole(file):
            if record.WhichOneof("record_type") == "history":
                yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def points(run, metric):
    return [(row["step"], row[metric]) for row in rows(run) if metric in row]


class TestWandbTracker(TrackerTests):
    config = WandbTracker(mode="offline")

    def steps(self, run, metric):
        return [step for step, _ in points(run, metric)]


@pytest.fixture
def run(tmp_path):
    return RunInfo(name="a run", run_dir=tmp_path, tags={"t" * 70: "true", "git": "abc"}, params={"optimizer.lr": "1"})


def test_one_run_over_all_attempts_and_a_late_evaluation(run, tmp_path):
    from attrs import evolve

    ids = set()
    for info, step in ((run, 7), (evolve(run, resumed_step=7, logged={"loss": 7}), 3)):
        tracker = WandbTracker(mode="offline").build()
        tracker.start(info)
        tracker.log(step, {"loss": 1.0, "perplexity": 2.0})
        tracker.finish("finished", tmp_path)
        ids.add(json.loads((tmp_path / "wandb.json").read_text())["id"])
    assert len(ids) == 1
    assert points(run, "loss") == [(7, 1.0)]
    assert points(run, "perplexity") == [(7, 2.0), (3, 2.0)]
    assert tracker.location().startswith(f"wandb sync {tmp_path}/wandb/offline-run-")


def test_who_is_not_logged_in_is_told_what_to_do(run, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(WMTPError, match=r"run `wandb login`, set WANDB_API_KEY, or set tracker.mode = 'offline'"):
        WandbTracker(mode="online").build().start(run)
