"""A resumed run goes on with the loop's own state: its random numbers, and the steps that it has skipped."""

import json
import shutil

import attrs
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import tiny_recipe

import wmtp
from wmtp.optim.update import learning_rate_factor


@attrs.frozen(kw_only=True)
class Drawn(wmtp.Trainer):
    """Weights by torch's own random numbers, which a plugin should not use, and none in the second step."""

    type = "drawn"

    def token_weights(self, view):
        return torch.rand(view.targets.ids.shape) * (view.step != 1)


def same_tensors(one, other):
    tensors = [
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (one, other)
    ]
    assert tensors[0].keys() == tensors[1].keys() != set()
    return all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.mark.parametrize("kept", [1, 2])
def test_random_numbers_and_skipped_steps_go_on(tmp_path, kept):
    (tmp_path / "code.jsonl").write_text("".join(f'{{"prompt": "a", "completion": "{"bc" * n}"}}\n' for n in range(1, 9)))
    recipe = tiny_recipe(
        str(tmp_path / "code.jsonl"),
        run={"output_dir": str(tmp_path), "name": "whole"},
        train={"max_steps": 4, "log_interval": 1},
        optimizer={"type": "adamw", "lr": 0.01},
        checkpoints={"save_interval": 1, "keep_last": 0},
    )
    config = attrs.evolve(wmtp.load_config(recipe), trainer=Drawn())
    whole = wmtp.run(config).run_dir
    assert same_tensors(whole / "checkpoints/step-1", whole / "checkpoints/step-2"), "a step without weight changes nothing"
    assert not same_tensors(whole / "checkpoints/step-2", whole / "checkpoints/step-3")
    parts = tmp_path / "elsewhere" / "whole"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "model")
    for step in range(kept + 1, 5):
        shutil.rmtree(parts / f"checkpoints/step-{step}")
    torch.manual_seed(99)
    moved = attrs.evolve(config, run=attrs.evolve(config.run, output_dir=str(parts.parent)))
    wmtp.run(moved, resume="auto")
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, parts)]
    assert [line.get("steps_without_weight") for line in lines[1]] == [None, 1.0, 1.0, 1.0]
    assert [line.get("loss") for line in lines[0]] == [line.get("loss") for line in lines[1]]
    assert same_tensors(whole / "model", parts / "model")
    factors = [learning_rate_factor(config.schedule, step, 4) for step in range(4)]
    for of_run in lines:
        assert [line["lr"] for line in of_run] == pytest.approx([0.01 * factor for factor in factors])
