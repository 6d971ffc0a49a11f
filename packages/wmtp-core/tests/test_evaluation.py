"""Evaluators against plain loops, and what they write."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.config.load import load_config
from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import PADDING, Batch, Document
from wmtp.distributed.failures import Failure
from wmtp.distributed.ranks import Ranks
from wmtp.errors import ConfigError, PluginError
from wmtp.evaluation import Estimate, Evaluator, Measured, command
from wmtp.evaluation.bootstrap import Bootstrap
from wmtp.evaluation.config import InferenceSpeed, PassAtK, Perplexity, Speculative, TokenAccuracy
from wmtp.evaluation.consent import require_consent
from wmtp.evaluation.measure import measure
from wmtp.evaluation.tokens import by_bucket
from wmtp.models.mtp import MTPModel
from wmtp.plugins.contract import EvaluatorConfig, TrackerConfig
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.tracking import RunInfo, Tracker

LLAMA = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
TEXTS = [[*list(range(10, 10 + n)), 5, 6, 5, 6] for n in (3, 40, 9, 1)]
PROMPTS = (2, 10, 0, 1)


def _batches(rows_at_once: int) -> list[Batch]:
    batches = []
    for start in range(0, len(TEXTS), rows_at_once):
        texts = TEXTS[start : start + rows_at_once]
        length = max(map(len, texts)) + start  # other padding in every batch
        ids = torch.full((len(texts), length), 256)
        document = torch.full((len(texts), length), PADDING)
        position = torch.zeros(len(texts), length, dtype=torch.int64)
        loss_mask = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            document[row, : len(text)] = row
            position[row, : len(text)] = torch.arange(len(text))
            loss_mask[row, PROMPTS[start + row] : len(text)] = True
        documents = [Document(index=start + row, start=0, id=str(row), group=str(row)) for row in range(len(texts))]
        batches.append(Batch(input_ids=ids, document=document, position=position, loss_mask=loss_mask, documents=documents))
    return batches


@pytest.fixture(scope="module")
def model() -> MTPModel:
    torch.manual_seed(0)
    return MTPModel(LlamaForCausalLM(LlamaConfig(**LLAMA)).eval(), HeadsConfig(horizon=3, kind="block"), seed=0).eval()


def _measured(model: MTPModel, rows_at_once: int = 2, **changes: Any) -> Measured:
    options = {
        "model": model, "tokenizer": BytesTokenizer(), "batches": _batches(rows_at_once), "device": torch.device("cpu"),
        "autocast": nullcontext, "seed": 1,
    }  # fmt: skip
    return Measured(**options | changes)


@torch.no_grad()
def _plain(model: MTPModel) -> list[tuple[int, int, int, float, bool]]:
    """Of every valid prediction: head, document, place of its target, loss, whether it is right."""
    found = []
    for number, text in enumerate(TEXTS):
        output = model(torch.tensor([text]))
        for k in range(1, 4):
            logits = model.logits(output, k)[0].double().log_softmax(-1)
            for t in range(len(text) - k):
                if t + k >= PROMPTS[number]:
                    right = int(logits[t].argmax()) == text[t + k]
                    found.append((k, number, t + k, -float(logits[t, text[t + k]]), right))
    return found


@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
def test_perplexity_and_accuracy_are_those_of_a_plain_loop(model: MTPModel, rows_at_once: int) -> None:
    measured = _measured(model, rows_at_once)
    perplexity, accuracy = Perplexity().build().evaluate(measured), TokenAccuracy().build().evaluate(measured)
    plain = _plain(model)
    for k in (1, 2, 3):
        for name, chosen in {
            f"head_{k}": [row for row in plain if row[0] == k],
            f"head_{k}/position/0-31": [row for row in plain if row[0] == k and row[2] < 32],
            f"head_{k}/position/32-127": [row for row in plain if row[0] == k and row[2] >= 32],
        }.items():
            assert float(perplexity[name]) == pytest.approx(math.exp(np.mean([row[3] for row in chosen])), rel=1e-4)
            assert float(accuracy[name]) == pytest.approx(np.mean([row[4] for row in chosen]))
            assert perplexity[name].low <= float(perplexity[name]) <= perplexity[name].high
        assert perplexity[f"head_{k}"].n == len(TEXTS)
        assert perplexity[f"head_{k}"].unit == "documents"
    assert {name.split("/")[2] for name in perplexity if "/frequency/" in name} <= {"common", "medium", "rare"}


def test_results_do_not_depend_on_batches(model: MTPModel) -> None:
    one, other = (Perplexity().build().evaluate(_measured(model, rows)) for rows in (1, 4))
    assert one.keys() == other.keys()
    for name in one:
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5)
        assert (one[name].low, one[name].high) == pytest.approx((other[name].low, other[name].high), rel=1e-5)


def test_frequency_buckets() -> None:
    token = np.array([7] * 5 + [3] * 3 + [1, 2])
    buckets = by_bucket(token, np.zeros(10, np.int64))
    assert buckets.tolist() == [0] * 5 + [1] * 3 + [1, 2]  # 7 is half of all; 3 and 1 begin before nine tenths


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = Bootstrap(60, "x", trial).ratio(generator.normal(3.0, 2.0, 60))
        covered += estimate.low <= 3.0 <= estimate.high
    assert 175 <= covered <= 199, covered
    again = [Bootstrap(5, "x", 7).ratio([1, 2, 3, 4, 9], [1, 1, 2, 2, 2]) for _ in range(2)]
    assert again[0] == again[1]
    assert float(again[0]) == pytest.approx(19 / 8)


def test_a_speed_of_more_rows_than_memory_holds_is_refused_before_they_are_made(model: MTPModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokens of 10000000000 rows of up to 10 tokens takes .* decode fewer rows at once"):
        measure([InferenceSpeed(batch_size=10**10, prompt_length=6, new_tokens=4)], _measured(model), tmp_path)


def test_decoding_is_measured(model: MTPModel, tmp_path: Path) -> None:
    evaluators = [
        Speculative(prompts=3, batch_size=2, max_new_tokens=8), InferenceSpeed(prompt_length=6, new_tokens=4, repeats=2),
        Speculative(prompts=2, max_new_tokens=6, temperature=1.0),
    ]  # fmt: skip
    numbers = measure(evaluators, _measured(model), tmp_path)
    assert numbers["speculative/identical"] == 1
    assert 1 <= numbers["speculative/tokens_per_forward"] <= 3
    assert numbers["speculative/speedup"] > 0 < numbers["speculative/speedup_over_transformers"]
    assert 0 <= numbers["speculative/acceptance_head_2"] <= 1
    assert {name.split("/")[0] for name in numbers} == {"speculative", "inference-speed", "speculative-2"}
    assert "speculative-2/identical" not in numbers  # a drawn text is another one each time
    assert min(numbers[f"inference-speed/{name}_tokens_per_second"] for name in ("prefill", "decode")) > 0
    assert json.loads((tmp_path / "evaluation.json").read_text()) == numbers
    details = json.loads((tmp_path / "evaluation-details.json").read_text())
    speculative = details["speculative"]
    assert speculative["settings"]["batch_size"] == 2
    assert speculative["seed"] == 1
    assert speculative["results"]["tokens_per_forward"].keys() == {"value", "low", "high", "n", "unit"}
    assert speculative["results"]["tokens_per_forward"]["n"] == 3

    measure([Perplexity()], _measured(model), tmp_path)  # what others found stays
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert kept.items() >= numbers.items()
    assert "perplexity/head_1" in kept
    assert "perplexity/head_1/position/0-31" not in kept
    assert "head_1/position/0-31" in json.loads((tmp_path / "evaluation-details.json").read_text())["perplexity"]["results"]


def test_speculation_by_fewer_heads(model: MTPModel) -> None:
    found = Speculative(prompts=2, max_new_tokens=8, drafts=1).build().evaluate(_measured(model))
    assert model.horizon > 2
    assert "acceptance_head_2" in found
    assert "acceptance_head_3" not in found


def test_speculation_without_extra_heads_is_an_error() -> None:
    model = MTPModel(LlamaForCausalLM(LlamaConfig(**LLAMA)).eval(), HeadsConfig(horizon=1), seed=0)
    with pytest.raises(ConfigError, match="needs extra heads"):
        Speculative().build().evaluate(_measured(model))


def test_a_plugins_plain_numbers_do_and_its_mistakes_are_named(model: MTPModel) -> None:
    class Numbers(Evaluator):
        def __init__(self, found: Any) -> None:
            self.found = found

        def evaluate(self, measured: Measured) -> Any:
            return self.found

    @frozen(kw_only=True)
    class Config(EvaluatorConfig):
        found: Any
        type = "numbers"

        def build(self) -> Evaluator:
            return Numbers(self.found)

    estimate = Estimate(value=2.0, low=1.0, high=3.0, n=4, unit="things")
    assert measure([Config(found={"a": 1, "b": estimate, "c/d": 3.0})], _measured(model), None) == {
        "numbers/a": 1.0, "numbers/b": 2.0,
    }  # fmt: skip
    with pytest.raises(PluginError, match="evaluator 'numbers'"):
        measure([Config(found=[1])], _measured(model), None)
    for value in (None, 10**400):
        said = rf"^evaluator '[\w-]+' \(.*\): evaluate returned {str(value)[:60]} as 'a', not a number"
        with pytest.raises(PluginError, match=said):
            measure([Config(found={"a": value})], _measured(model), None)


def _scaled(model: MTPModel) -> None:
    model.base.lm_head.weight.data.mul_(0.5)


def _exchanged(model: MTPModel) -> None:
    with torch.no_grad():
        model.base.lm_head.weight.copy_(model.base.lm_head.weight.flip(0))


def _moved(model: MTPModel) -> None:
    model.to("meta")


def _training(model: MTPModel) -> None:
    model.train()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_scaled, r"changed \S*lm_head.weight"),
        (_exchanged, r"changed \S*lm_head.weight"),
        (_moved, r"moved \S+ to the device meta and \d+ more"),
        (_training, "left the model in training mode"),
    ],
)
def test_an_evaluator_that_changes_the_model_is_refused(model: MTPModel, change: Any, said: str) -> None:
    class Changes(Evaluator):
        def evaluate(self, measured: Measured) -> Any:
            change(measured.model)
            return {"a": 1}

    class Config(EvaluatorConfig):
        type = "changes"

        def build(self) -> Evaluator:
            return Changes()

    with pytest.raises(PluginError, match=rf"^evaluator 'changes' \(.*\): evaluate {said}, which others measure after it"):
        measure([Config()], _measured(copy.deepcopy(model)), None)


@frozen(kw_only=True, eq=False)
class Waiting(Ranks):
    """Rank 1 of two, which waits while rank 0 evaluates and gets what it found; then rank 0 fails."""

    def main_only(self, work: Any) -> Any:
        return {"a": 1}

    def objects(self, value: Any) -> list[Any]:
        return [Failure.of(PluginError("evaluate changed lm_head.weight"), 0), value]


def test_a_model_that_was_changed_on_one_rank_alone_ends_all_of_them(model: MTPModel) -> None:
    class Config(EvaluatorConfig):
        type = "alone"
        one_process = True

        def build(self) -> Evaluator:
            return Nothing()

    class Nothing(Evaluator):
        def evaluate(self, measured: Measured) -> Any:
            return {}

    with pytest.raises(PluginError, match=r"^rank 0 \(.*\): evaluate changed lm_head.weight"):
        measure([Config()], _measured(model, ranks=Waiting(rank=1, world_size=2)), None)


def test_code_needs_the_users_word(model: MTPModel) -> None:
    with pytest.raises(ConfigError, match=r"eval.1: 'pass-at-k' runs code .* --allow-code-execution"):
        require_consent([Perplexity(), PassAtK()], allowed=False)
    require_consent([PassAtK()], allowed=True)
    with pytest.raises(ConfigError, match="allow-code-execution"):
        PassAtK().build().evaluate(_measured(model))


class Noted(Tracker):
    """Keeps what it is told."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def start(self, run: RunInfo) -> None:
        self.told.append((run.resumed_step, dict(run.logged)))

    def log(self, step: int, metrics: Any) -> None:
        self.told.append((step, dict(metrics)))

    def finish(self, status: str, model: Path | None) -> None: ...


def test_a_killed_runs_evaluation_is_tracked_at_its_last_whole_step(tmp_path: Path) -> None:
    """Else TensorBoard would hide all of its curve."""
    told: list[Any] = []

    @frozen(kw_only=True)
    class NotedTracker(TrackerConfig):
        type = "noted"

        def build(self) -> Tracker:
            return Noted(told)

    recipe = {
        "models": {"base": {"type": "scratch", "vocab_size": 258}}, "tokenizer": {"type": "bytes"},
        "datasets": {"code": {"type": "python-source"}}, "trainer": {"type": "baseline-mtp"},
    }  # fmt: skip
    config = evolve(load_config(recipe), tracker=NotedTracker())
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    command._track(config, tmp_path, tmp_path, {"perplexity/head_1": 2.0})
    assert told == [(10, {"loss": 10}), (10, {"perplexity/head_1": 2.0})]


def test_more_new_tokens_than_positions_are_a_mistake_of_the_config(model: MTPModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves room for 1000000 new tokens"):
        measure([Speculative(max_new_tokens=10**6)], _measured(model), tmp_path)
