"""A config whose paths are made absolute, for a run's snapshot."""

import pytest

from wmtp.config.inputs import anchored, inputs, with_uris
from wmtp.config.load import load

CONFIG = {
    "run": {"output_dir": "out"},
    "models": {"base": {"type": "scratch", "vocab_size": 258}},
    "tokenizer": {"type": "bytes"},
    "datasets": {
        "plain": {"type": "jsonl", "uri": "data/x.jsonl"},
        "far": {"type": "jsonl", "uri": "s3://bucket/x.jsonl"},
        "home": {"type": "jsonl", "uri": "~/x.jsonl"},
    },
    "trainer": {"type": "baseline-mtp"},
}
DATABASE = {"type": "mlflow", "tracking_uri": "sqlite:///runs/m.db"}


@pytest.mark.parametrize("tracker", [DATABASE, {"type": "several", "of": [DATABASE, {"type": "jsonl"}]}])
def test_relative_paths_become_absolute_and_nothing_else(tmp_path, monkeypatch, tracker):
    monkeypatch.chdir(tmp_path)
    config = anchored(load({**CONFIG, "tracker": tracker}).config)
    uris = {one.key: one.uri for one in inputs(config)}
    assert uris == {
        "datasets.plain.uri": f"{tmp_path}/data/x.jsonl",
        "datasets.far.uri": "s3://bucket/x.jsonl",
        "datasets.home.uri": "~/x.jsonl",
    }
    assert config.run.output_dir == f"{tmp_path}/out"
    assert f"sqlite:///{tmp_path}/runs/m.db" in str(config.tracker)
    assert anchored(config) == config


def test_uris_are_put_in_by_key():
    config = load(CONFIG).config
    changed = with_uris(config, {"datasets.plain.uri": "hf://datasets/a/b"})
    assert changed.datasets["plain"].uri == "hf://datasets/a/b"
    assert changed.datasets["far"] is config.datasets["far"]
    assert with_uris(config, {}) is config
