"""A step in which nothing has weight changes nothing and is counted; a message's weight holds under every trainer."""

import json

import attrs
import pytest
import torch
from safetensors.torch import load_file

import wmtp
from wmtp.config.schema import (
    Config,
    DataConfig,
    HeadsConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    TrainDataConfig,
)
from wmtp.data.config import Chat, Jsonl
from wmtp.errors import PluginError
from wmtp.models.config import ScratchModel
from wmtp.tokenizers.config import Bytes
from wmtp.tracking.config import JsonlTracker
from wmtp.trainers import Trainer

MODEL = ScratchModel(vocab_size=258, hidden_size=16, layers=2, attention_heads=2, max_positions=64, intermediate_size=24)
TEMPLATE = (
    "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ ';' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@attrs.frozen(kw_only=True)
class Data(Trainer):
    """The data's own weights, as `column`."""

    type = "data-weights"

    def token_weights(self, view):
        return view.batch.weight


@attrs.frozen(kw_only=True)
class Plain(Trainer):
    type = "plain-weights"


@attrs.frozen(kw_only=True)
class Halves(Trainer):
    """Weights that are not uniform."""

    type = "half-weights"

    def token_weights(self, view):
        return torch.full(view.batch.input_ids.shape, 0.5)


def run(tmp_path, name, dataset, trainer, steps, **train):
    config = Config(
        models={"base": ModelConfig(loader=MODEL, heads=HeadsConfig(horizon=2))},
        tokenizer=Bytes(),
        datasets={"d": dataset},
        data=DataConfig(train=TrainDataConfig(max_length=48, batch_size=1, packing=False, shuffle=False, **train)),
        trainer=trainer,
        schedule=ScheduleConfig(type="constant"),
        train=TrainConfig(max_steps=steps),
        run=RunConfig(output_dir=str(tmp_path), name=name),
        tracker=JsonlTracker(),
    )
    done = wmtp.run(config)
    logged = [json.loads(line) for line in (done.run_dir / "metrics.jsonl").read_text().splitlines()]
    return load_file(done.run_dir / "model" / "model.safetensors"), logged


def lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


ZERO = {"prompt": "p", "completion": "abc", "weights": [0, 0, 0]}
SOME = {"prompt": "q", "completion": "def", "weights": [1, 2, 1]}


def test_a_step_without_weight_is_skipped_and_counted(tmp_path, caplog):
    both = Jsonl(uri=str(lines(tmp_path / "both.jsonl", [ZERO, SOME, ZERO])))
    one = Jsonl(uri=str(lines(tmp_path / "one.jsonl", [SOME])))
    skipped, logged = run(tmp_path, "both", both, Data(), 3)
    wanted, _ = run(tmp_path, "one", one, Data(), 1)
    assert all(torch.equal(skipped[name], wanted[name]) for name in wanted)
    assert [step.get("steps_without_weight") for step in logged] == [1, 1, 2]
    assert ["loss" in step for step in logged] == [False, True, False]
    (said,) = [record.message for record in caplog.records if "has weight 0" in record.message]
    assert "step 1 is skipped" in said


def test_a_run_without_any_weight_is_an_error(tmp_path):
    nothing = Jsonl(uri=str(lines(tmp_path / "zero.jsonl", [ZERO])))
    with pytest.raises(PluginError, match=r"every prediction of the step has weight 0, .*in all of the first 2 steps"):
        run(tmp_path, "zero", nothing, Data(), 2)


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize("trainer", [Plain(), Halves()])
def test_weights_of_messages_and_data_sets_hold_under_every_trainer(tmp_path, trainer):
    def trained(name, records, **train):
        chat = Chat(uri=str(lines(tmp_path / f"{name}.jsonl", records)))
        return run(tmp_path, name, chat, trainer, 1, chat_template=TEMPLATE, **train)[0]

    def turns(first, second):
        answers = [{"role": "assistant", "content": "yes", **first}, {"role": "assistant", "content": "no", **second}]
        return [{"messages": [USER, answers[0], USER, answers[1]]}]

    def same(left, right):
        return all(torch.allclose(left[name], right[name], rtol=1e-6, atol=1e-8) for name in left)

    plain = trained("plain", turns({}, {}))
    half = trained("half", turns({}, {"weight": 0.5}))
    assert not same(plain, half)
    assert same(half, trained("scaled", turns({"weight": 2}, {"weight": 1})))
    off = trained("off", turns({}, {"weight": 0}))
    assert same(off, trained("untrained", turns({}, {"train": False})))
    assert same(plain, trained("all-double", turns({}, {}), response_weights={"d": 2.0}))
    prompt = trained("prompt", turns({}, {}), prompt_weights={"d": 1.0})
    assert same(prompt, trained("learn-all", turns({}, {}), learn="all"))
    assert not same(prompt, trained("less", turns({}, {}), prompt_weights={"d": 0.1}))
