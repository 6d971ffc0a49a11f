"""critic-wmtp as a user runs it: what it learns, what a resume keeps, and what is refused before anything is read."""

import json
import random
import shutil
from collections import defaultdict
from itertools import product
from typing import ClassVar

import attrs
import pytest
import torch
from crossings import sampled
from safetensors.torch import load_file

from wmtp import load_config, run
from wmtp.config.rules import check
from wmtp.config.schema import TrainConfig
from wmtp.data.config import Chat
from wmtp.errors import ConfigError, WMTPError
from wmtp_algos import DFT, BaselineMTP, CriticWMTP, Shuffled
from wmtp_algos.critic_wmtp import CriticWMTPTrainer

CLOCK = ("tokens_per_second", "peak_memory_gib")


def documents(count=240, *, seed=0, **labels):
    """Random letters, and somewhere among them the one that decides: Y in correct answers, N in incorrect ones."""
    draw = random.Random(seed)
    for i in range(count):
        body = [draw.choice("abcdefgh") for _ in range(draw.randint(6, 12))]
        good = i % 2 == 0
        body[draw.randrange(1, len(body) - 1)] = "Y" if good else "N"
        yield {"id": f"d{i}", "group": f"g{i // 4}", "prompt": "go:", "completion": "".join(body), "is_correct": good} | {
            name: value(i) for name, value in labels.items()
        }


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic")
    write(folder / "code.jsonl", documents())
    return folder


def config_of(folder, *overrides, data="code", **trainer):
    plain = load_config(
        {
            "run": {"output_dir": str(folder / "runs")},
            "models": {
                "base": {
                    "type": "scratch", "vocab_size": 258, "hidden_size": 32, "layers": 2, "attention_heads": 2,
                    "intermediate_size": 48, "max_positions": 64, "heads": {"horizon": 2},
                }
            },
            "tokenizer": {"type": "bytes"},
            "datasets": {data: {"type": "jsonl", "uri": str(folder / f"{data}.jsonl")}},
            "data": {"train": {"max_length": 24, "batch_size": 16, "packing": False}},
            "trainer": {"type": "critic-wmtp"},
            "optimizer": {"type": "adamw", "lr": 1e-4},
            "schedule": {"type": "constant"},
            "train": {"max_steps": 12},
            "checkpoints": {"save_final": False},
            "tracker": {"type": "jsonl"},
        },
        overrides,
    )  # fmt: skip
    return attrs.evolve(plain, trainer=CriticWMTP(**{"value_steps": 6, "value_width": 32} | trainer))


def lines_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


# --- what it learns


class Spy(CriticWMTPTrainer):
    """Remembers the weights that each letter of the answers got."""

    weights: ClassVar = defaultdict(list)

    def token_weights(self, view):
        weights = super().token_weights(view)
        for token, weight in zip(view.batch.input_ids[view.batch.loss_mask], weights[view.batch.loss_mask], strict=True):
            Spy.weights[chr(int(token)) if token < 256 else "end"].append(float(weight))
        return weights


@attrs.frozen(kw_only=True)
class SpyConfig(CriticWMTP):
    type = "spy"

    def build(self):
        Spy.weights.clear()
        return Spy(self)


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(more, marks=pytest.mark.slow) for more in ({"delta": "td"}, {"train_on": "all"}))], ids=str
)
def test_the_token_that_decides_gets_the_largest_weight(folder, options):
    config = config_of(folder, "train.max_steps=130", "data.train.batch_size=32", value_steps=120, value_lr=5e-3)
    config = attrs.evolve(config, trainer=SpyConfig(**attrs.asdict(config.trainer) | options))
    run(config, run_name=f"decides-{len(options)}-{next(iter(options), '')}")
    means = {letter: sum(weights) / len(weights) for letter, weights in Spy.weights.items()}
    assert max(means, key=means.get) == "Y", means


def test_a_pairwise_stage_sees_both_classes_of_a_problem_in_every_step(folder):
    for packing in ("true", "false"):
        config = config_of(folder, f"data.train.packing={packing}", value_loss="pairwise", value_steps=10)
        lines = lines_of(run(config, run_name=f"pairs-{packing}").run_dir)
        assert [line["stage"] for line in lines] == ["value"] * 10 + ["train"] * 2
        assert all("critic/pairwise_accuracy" in line for line in lines[:10])
        assert all("critic/pairwise_accuracy" not in line for line in lines[10:]), "only correct documents are left"


def _tensors_of(checkpoint, prefix):
    """The tensors of a checkpoint whose names begin so, whichever of its files they are in."""
    files = [load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items() if name.startswith(prefix)}


def test_what_learns_in_which_stage(folder):
    whole = ["checkpoints.save_interval=6", "checkpoints.keep_last=0"]
    for learns in (False, True):
        run_dir = run(config_of(folder, *whole, value_learns=learns), run_name=f"learns-{learns}").run_dir
        modules = [
            torch.load(run_dir / f"checkpoints/step-{step}/state.pt", weights_only=True)["modules"]["value_head"]
            for step in (6, 12)
        ]
        same = all(torch.equal(modules[0][name], modules[1][name]) for name in modules[0])
        assert same is not learns
        models = [_tensors_of(run_dir / f"checkpoints/step-{step}", "model.") for step in (6, 12)]
        assert any(not torch.equal(models[0][name], models[1][name]) for name in models[0])
        lines = lines_of(run_dir)
        assert [line["stage"] for line in lines] == ["value"] * 6 + ["train"] * 6
        assert all(("auxiliary/value" in line) == (learns or line["stage"] == "value") for line in lines)
        for name in ("critic/advantage_mean", "critic/advantage_std"):
            assert all((name in line) == (line["stage"] == "train") for line in lines), "weights are known in that stage"
        assert all("critic/value_loss" in line for line in lines)
        assert all(line["weight/zero_share"] == 0.0 for line in lines[6:]), "wrong documents are not even counted"
        assert all(line["weight/mean"] == pytest.approx(1.0) for line in lines[6:] if not learns)


def test_a_control_of_the_critic_learns_no_other_documents(folder):
    from wmtp_algos import Shuffled

    config = config_of(folder, value_learns=True)
    runs = [
        lines_of(run(attrs.evolve(config, trainer=trainer), run_name=name).run_dir)
        for name, trainer in (("treated", config.trainer), ("control", Shuffled(of=config.trainer)))
    ]
    for treated, control in zip(*runs, strict=True):
        assert control["weight/zero_share"] == pytest.approx(treated["weight/zero_share"], abs=1e-9)
    assert runs[0][-1]["loss"] != runs[1][-1]["loss"]


# --- resume, early end, reuse


@pytest.mark.parametrize(
    ("options", "kept"),
    sampled(product(({}, {"critic": "model", "value_loss": "pairwise", "value_learns": True}), (4, 8)), 3),
    ids=["trunk-in-value", "trunk-in-train", "model-in-value", "model-in-train"],
)
def test_a_resume_in_either_stage_is_bit_for_bit(folder, options, kept):
    overrides = ["checkpoints.save_interval=4", "checkpoints.keep_last=0", "data.train.micro_batch_size=5"]
    if "critic" in options:
        critic = folder / "runs/critic/model"
        if not critic.exists():
            run(config_of(folder, "train.max_steps=8"), run_name="critic")
        overrides += ['models.critic={type="hf",uri="' + str(critic) + '"}']
    config = config_of(folder, *overrides, **options)
    parts = run(config, run_name=f"parts-{kept}-{len(options)}").run_dir
    whole = parts.with_name(f"whole-{kept}-{len(options)}")
    shutil.copytree(parts, whole)
    shutil.rmtree(parts / "model")
    for checkpoint in (parts / "checkpoints").iterdir():
        if int(checkpoint.name.partition("-")[2]) > kept:
            shutil.rmtree(checkpoint)
    run(config, run_name=parts.name, resume="auto")
    assert lines_of(parts) == lines_of(whole)
    files = ["model.safetensors", "modules/value_head.safetensors"] + ["modules/critic.safetensors"] * ("critic" in options)
    for file in files:
        left, right = load_file(whole / "model" / file), load_file(parts / "model" / file)
        assert all(torch.equal(left[name], right[name]) for name in left), file


def test_the_value_stage_ends_when_its_loss_stands_still(folder):
    lines = lines_of(run(config_of(folder, value_steps=10, value_patience=3, value_min_delta=100.0), run_name="early").run_dir)
    assert [line["stage"] for line in lines] == ["value"] * 5 + ["train"] * 7, "three steps without progress, and one under way"


def test_a_value_head_is_reused(folder):
    first = run(config_of(folder), run_name="first").run_dir
    config = config_of(folder, value_head=str(first))
    second = run(config, run_name="second").run_dir
    assert [line["stage"] for line in lines_of(second)] == ["train"] * 12
    left, right = (load_file(one / "model/modules/value_head.safetensors") for one in (first, second))
    assert all(torch.equal(left[name], right[name]) for name in left)
    run(config_of(folder, value_head=str(first / "model")), run_name="third")

    with pytest.raises(
        WMTPError, match=r"value_head.safetensors: its tensors do not fit .* has shape \[32, 32\] in place of \[48, 32\]"
    ):
        run(config_of(folder, value_head=str(first), value_width=48), run_name="fourth")
    with pytest.raises(WMTPError, match=r"holds no modules/value_head.safetensors; give a finished run, or its model folder"):
        run(config_of(folder, value_head=str(folder)), run_name="fourth")
    with pytest.raises(ConfigError, match=r"trainer.value_head: '.*nowhere' does not exist"):
        run(config_of(folder, value_head=str(folder / "nowhere")), run_name="fourth")


# --- pairs of answers

TEMPLATE = (
    "{% for m in messages %}{{ '[' ~ m.role ~ ']' ~ m.content ~ '.' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"q{n % 3}", "chosen": f"good {n % 4}", "rejected": f"bad {n % 5}", "id": f"p{n}"} for n in range(12)]
    write(tmp_path / "pairs.jsonl", rows)

    def config(trainer, **answers):
        given = config_of(tmp_path, f"data.train.chat_template={TEMPLATE!r}", "data.train.max_length=48", data="pairs")
        return attrs.evolve(given, datasets={"pairs": Chat(uri=str(tmp_path / "pairs.jsonl"), **answers)}, trainer=trainer)

    return config


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"value_loss": "pairwise"}], ids=str)
def test_chosen_and_rejected_answers_train_a_critic(pairs, options):
    critic = CriticWMTP(value_steps=4, value_width=32, **options)
    config = attrs.evolve(pairs(critic, answers="both"), train=TrainConfig(max_steps=6))
    result = run(config, run_name="pairs")
    lines = lines_of(result.run_dir)
    assert [line["stage"] for line in lines] == ["value"] * 4 + ["train"] * 2
    assert result.steps == 6
    # in stage train the chosen answers alone are learned: each a run of at most 7 tokens
    assert all(0 < line["tokens"] <= 16 * 48 for line in lines)


@pytest.mark.parametrize("trainer", [BaselineMTP(), DFT(), Shuffled(of=DFT())], ids=lambda trainer: trainer.type)
def test_trainers_that_learn_from_all_must_be_given_the_chosen_answers(pairs, trainer):
    with pytest.raises(ConfigError) as caught:
        check(pairs(trainer, answers="both"))
    (problem,) = caught.value.problems
    assert problem == (
        f"datasets.pairs.answers: 'both' gives right and wrong answers, and the trainer '{trainer.type}' would learn them "
        "alike; write 'chosen', or take a trainer that tells them apart: critic-wmtp"
    )
    check(pairs(trainer, answers="chosen"))
    check(pairs(Shuffled(of=CriticWMTP()), answers="both"))


# --- what cannot work is said before anything is learned


def always(value):
    return lambda i: value


none = always(None)


def half(i):
    return None if i % 2 else True


PAIRWISE = {"value_loss": "pairwise"}
ONLY_WRONG = {"is_correct": always(False), "reward": float}


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        ({"is_correct": none}, {}, "none of its 240 documents has is_correct or a reward, which trainer.reward = 'verifiable'"),
        ({"is_correct": half}, {}, r"120 of its 240 documents \(the first is 'd1'\) have no is_correct"),
        ({"is_correct": always(True)}, {}, "all 240 documents have the same reward, 1, so there is no value to learn"),
        ({"reward": always(0.25)}, {}, "all 240 documents have the same reward, 0.25"),
        (ONLY_WRONG, {}, "none of the 240 documents is correct, and trainer.train_on = 'correct'"),
        (ONLY_WRONG, PAIRWISE, "all 240 documents are incorrect; .* add correct"),
        ({"group": lambda i: f"g{i}"}, PAIRWISE, r"no problem \(group\) has both"),
        (
            {"completion": lambda i: "abc" if i % 2 else "abcdefghijkl"},
            PAIRWISE,
            "no two answers to one problem, .* are of about equal length; raise trainer.pair_length_ratio = 1.5",
        ),
    ],
)
def test_data_that_no_critic_can_learn_from(tmp_path, labels, options, words):
    write(tmp_path / "mine.jsonl", documents(**labels))
    for arguments in ({"dry_run": True}, {"run_name": "x"}):
        with pytest.raises(ConfigError, match=r"^datasets.mine: .*" + words):
            run(config_of(tmp_path, data="mine", **options), **arguments)


def test_correct_documents_alone_are_enough_with_a_learned_value_head(folder, tmp_path):
    learned = run(config_of(folder), run_name="for-others").run_dir
    write(tmp_path / "mine.jsonl", documents(is_correct=lambda i: True))
    run(config_of(tmp_path, data="mine", value_head=str(learned)), run_name="x")


def test_pairs_need_two_rows(folder):
    with pytest.raises(
        ConfigError, match=r"data.train.batch_size: 1, but the trainer wants documents in one step that need 2 rows"
    ):
        run(config_of(folder, "data.train.batch_size=1", value_loss="pairwise"), dry_run=True)


def test_a_value_that_explodes_is_named(folder):
    with pytest.raises(WMTPError, match=r"the loss is (nan|inf) .*; auxiliary/value of trainer 'critic-wmtp' .* is (nan|inf)"):
        run(config_of(folder, "train.max_grad_norm=0", value_lr=1e30), run_name="explodes")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"min_weight": 4.0}, "trainer.min_weight: 4.0 must be at most max_weight = 3.0"),
        ({"reward_template": "{prompt}"}, "trainer.reward_template: must hold {completion}"),
        ({"reward": "model"}, "models.rm: required by the trainer 'critic-wmtp', and missing"),
        ({"critic": "model"}, "models.critic: required by the trainer 'critic-wmtp', and missing"),
    ],
)
def test_configs_that_contradict_themselves(folder, options, problem):
    with pytest.raises(ConfigError) as caught:
        run(config_of(folder, **options), dry_run=True)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", 0.0), ("gamma", 0.0), ("gae_lambda", 1.5), ("value_steps", 0), ("min_weight", -1.0), ("ema_decay", 1.0)],
)
def test_values_that_make_no_sense(key, value):
    with pytest.raises(ValueError, match=key):
        CriticWMTP(**{key: value})
