"""A trainer that changes the working folder moves nothing of its run."""

import json
import os

import attrs
import pytest
from tiny_recipe import tiny_recipe

import wmtp
from wmtp.trainers import Trainer


@attrs.frozen(kw_only=True)
class Wanders(Trainer):
    type = "wanders"
    to: str

    def token_weights(self, view):
        os.chdir(self.to)
        return view.uniform()


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    line = json.dumps({"prompt": "def f():", "completion": " return 1"})
    for name in ("train", "eval"):
        (tmp_path / "here" / f"{name}.jsonl").write_text("\n".join([line] * 4))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_trainer_that_changes_the_working_folder_moves_nothing(here):
    there = here.parent / "there"
    table = tiny_recipe(
        "train.jsonl",
        datasets={name: {"type": "jsonl", "uri": f"{name}.jsonl"} for name in ("train", "eval")},
        data={"train": {"max_length": 32, "batch_size": 2, "sources": ["train"]}, "eval": {"sources": ["eval"]}},
        train={"max_steps": 2, "eval_interval": 1},
        checkpoints={"uri": "kept", "save_interval": 1},
        run={"output_dir": "runs", "name": "x", "push_to": "pushed"},
        eval=[{"type": "perplexity"}],
    )
    del table["trainer"]
    registry = wmtp.load_plugins().with_classes([("trainers", Wanders)])
    config = wmtp.load_config([table, {"trainer": {"type": "wanders", "to": str(there)}}], registry=registry)
    result = wmtp.run(config)
    assert list(there.iterdir()) == []
    assert result.run_dir == here / "runs" / "x"
    assert {path.name for path in here.iterdir()} == {"train.jsonl", "eval.jsonl", "runs", "kept", "pushed"}
    assert sorted(path.name for path in (here / "kept").iterdir()) == ["step-1", "step-2"]
    assert (here / "pushed" / "config.json").is_file()
    assert "perplexity" in str(result.metrics)
