"""A resumed run goes on with the loop's own state: its random numbers, and the steps that it has skipped."""

import json
import shutil

import attrs
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import TINY_MODEL, tiny_recipe

import wmtp
from wmtp.optim.update import learning_rate_factor
from wmtp.runs.directory import find_unfinished, record


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


@attrs.frozen(kw_only=True)
class Resting(wmtp.Trainer):
    """Learns in the first three steps; the others change nothing."""

    type = "resting"

    def token_weights(self, view):
        return torch.full(view.targets.ids.shape, float(view.step < 3))


def test_a_run_in_fp8_goes_on_in_bf16_from_the_same_copies_and_back(tmp_path, caplog):
    pytest.importorskip("torchao")
    (tmp_path / "code.jsonl").write_text("".join(f'{{"prompt": "a", "completion": "{"bc" * n}"}}\n' for n in range(1, 9)))

    def config(steps, **devices):
        recipe = tiny_recipe(
            str(tmp_path / "code.jsonl"),
            run={"output_dir": str(tmp_path)},
            models={"base": TINY_MODEL | {"hidden_size": 32, "intermediate_size": 48}},
            train={"max_steps": steps},
            schedule={"type": "constant"},
            optimizer={"type": "adamw", "lr": 0.01},
            checkpoints={"save_interval": 1, "keep_last": 0},
            devices=devices,
        )
        return attrs.evolve(wmtp.load_config(recipe), trainer=Resting())

    fp8 = {"precision": "fp8", "fp8": {"emulate": True, "min_features": 16}}
    run = wmtp.run(config(3, **fp8)).run_dir
    model = shutil.move(run / "model", tmp_path / "model")
    caplog.clear()
    for steps, devices in ((4, {"precision": "bf16-params"}), (5, fp8)):
        wmtp.run(config(steps, **devices), resume=run)
        assert same_tensors(run / "model", model)
        shutil.rmtree(run / "model")
    assert same_tensors(run / "checkpoints/step-3", run / "checkpoints/step-4"), "fp32 copies, and what the optimizer keeps"
    assert same_tensors(run / "checkpoints/step-3", run / "checkpoints/step-5")
    warned = [record.getMessage() for record in caplog.records if "computed otherwise" in record.getMessage()]
    assert ['→ "bf16-params"' in line for line in warned] == [True, False]
    assert ['→ "fp8"' in line for line in warned] == [False, True]
    changes = [entry["changed"] for entry in json.loads((run / "run.json").read_text())["resumed"]]
    assert changes[0][0] == 'devices.precision: "fp8" → "bf16-params"'
    with pytest.raises(wmtp.ConfigError, match=r'devices\.precision: "fp8" → "fp32"'):
        wmtp.run(config(5, precision="fp32"), resume=run)
    with pytest.raises(wmtp.ConfigError, match=r"devices\.fp8\.min_features: 16 → 32"):
        wmtp.run(config(5, precision="fp8", fp8={"emulate": True, "min_features": 32}), resume=run)
    record(run, {"status": "interrupted"})
    assert find_unfinished(config(5, **fp8)) == run
    assert find_unfinished(config(5, precision="bf16-params")) is None, "another run, unless it is named"
