"""`EvaluatorTests` passes our own evaluators, and fails each kind of broken one."""

import inspect
import json
from typing import ClassVar

import attrs
import pytest
import torch
from attrs import evolve

from wmtp.evaluation import Estimate, Evaluator
from wmtp.evaluation.config import InferenceSpeed, PassAtK, Perplexity, Speculative, TokenAccuracy
from wmtp.plugins.contract import EvaluatorConfig
from wmtp.testing import EvaluatorTests
from wmtp.training.evaluate import evaluate


class TestPerplexity(EvaluatorTests):
    config = Perplexity()


class TestTokenAccuracy(EvaluatorTests):
    config = TokenAccuracy()


class TestSpeculative(EvaluatorTests):
    config = Speculative(prompts=2, max_new_tokens=8)
    varies = frozenset({"speedup", "speedup_over_transformers"})


class TestInferenceSpeed(EvaluatorTests):
    config = InferenceSpeed(prompt_length=8, new_tokens=4, repeats=2)
    varies = frozenset({"prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_mb"})


class TestPassAtK(EvaluatorTests):
    config = PassAtK(uri="unused", max_new_tokens=4, samples=2, k=(1,), isolation="process", timeout=20.0)

    @pytest.fixture(autouse=True)
    def problems(self, tmp_path_factory, monkeypatch):
        file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
        problem = {"task_id": "a/1", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1\n"}
        file.write_text(json.dumps(problem) + "\n")
        monkeypatch.setattr(type(self), "config", evolve(type(self).config, uri=str(file)))


def config_of(evaluator_class):
    """A config class for an evaluator class."""

    @attrs.frozen(kw_only=True)
    class TestedEvaluator(EvaluatorConfig):
        type: ClassVar[str] = "tested"

        def build(self):
            return evaluator_class()

    return TestedEvaluator()


class Loss(Evaluator):
    """The mean loss, from what the loop's own evaluation gives."""

    def numbers(self, measured):
        return evaluate(measured.model, measured.batches, measured.device, measured.autocast)

    def evaluate(self, measured):
        return {"loss": self.numbers(measured)["eval/loss"]}


class TestLoss(EvaluatorTests):
    config = config_of(Loss)
    registered = False


class NoNumbers(Loss):
    def evaluate(self, measured):
        return {"detail/only": 1.0}


class AText(Loss):
    def evaluate(self, measured):
        return {"loss": "low"}


class NotAMapping(Loss):
    def evaluate(self, measured):
        return [1.0]


class OutsideOfItsInterval(Loss):
    def evaluate(self, measured):
        return {"loss": Estimate(value=1.0, low=2.0, high=3.0, n=4, unit="documents")}


class ChanceOfItsOwn(Loss):
    def evaluate(self, measured):
        return {"loss": float(torch.rand(()))}


class Remembers(Loss):
    calls = 0

    def evaluate(self, measured):
        Remembers.calls += 1
        return {"loss": float(Remembers.calls)}


class MeanOfMeans(Loss):
    def evaluate(self, measured):
        each = [self.numbers(evolve(measured, batches=[batch]))["eval/loss"] for batch in measured.batches]
        return {"loss": sum(each) / len(each)}


class ChangesTheModel(Loss):
    def evaluate(self, measured):
        found = super().evaluate(measured)
        with torch.no_grad():
            next(measured.model.parameters()).mul_(1.5)
        return found


class LeavesTrainingMode(Loss):
    def evaluate(self, measured):
        found = super().evaluate(measured)
        measured.model.train()
        return found


class LeavesGradients(Loss):
    def evaluate(self, measured):
        next(measured.model.parameters()).sum().backward()
        return super().evaluate(measured)


class WritesAnywhere(Loss):
    def evaluate(self, measured):
        with open("losses.txt", "w") as file:
            file.write("1")
        return super().evaluate(measured)


class Prints(Loss):
    def evaluate(self, measured):
        print("measuring")
        return super().evaluate(measured)


class NeedsAnOutput(Loss):
    def evaluate(self, measured):
        measured.output_dir.mkdir(parents=True, exist_ok=True)
        return super().evaluate(measured)


class TrustsTheCommandLine(Loss):
    """Runs code without having asked."""


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (NoNumbers, "test_numbers_by_name"),
        (AText, "test_numbers_by_name"),
        (NotAMapping, "test_numbers_by_name"),
        (OutsideOfItsInterval, "test_numbers_by_name"),
        (ChanceOfItsOwn, "test_again_gives_the_same"),
        (Remembers, "test_again_gives_the_same"),
        (MeanOfMeans, "test_batches_change_nothing"),
        (ChangesTheModel, "test_the_model_stays_as_it_is"),
        (LeavesTrainingMode, "test_the_model_stays_as_it_is"),
        (LeavesGradients, "test_the_model_stays_as_it_is"),
        (WritesAnywhere, "test_files_only_where_they_may_be"),
        (Prints, "test_files_only_where_they_may_be"),
        (NeedsAnOutput, "test_files_only_where_they_may_be"),
        (NotAMapping, "test_a_run_keeps_what_it_finds"),
    ],
)
def test_a_broken_evaluator_fails(broken, test, request, tmp_path, monkeypatch, capfd):
    suite = type("Suite", (EvaluatorTests,), {"config": config_of(broken), "registered": False, "__test__": False})()
    given = {"measured": EvaluatorTests.measured.__wrapped__(suite), "tmp_path": tmp_path, "monkeypatch": monkeypatch}
    given["capfd"] = capfd
    method = getattr(suite, test)
    with pytest.raises(Exception) as error:
        method(**{name: given[name] for name in inspect.signature(method).parameters})
    assert not isinstance(error.value, pytest.skip.Exception)


def test_code_that_runs_unasked_fails():
    config = config_of(TrustsTheCommandLine)
    type(config).executes_code = True
    suite = type("Suite", (EvaluatorTests,), {"config": config, "registered": False, "__test__": False})()
    with pytest.raises(pytest.fail.Exception):
        suite.test_code_of_the_model_runs_only_where_the_user_says_so(EvaluatorTests.measured.__wrapped__(suite))
