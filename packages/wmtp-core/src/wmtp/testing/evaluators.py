"""Suite for evaluators."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from attrs import evolve

from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import PADDING, Batch
from wmtp.distributed.ranks import SINGLE_PROCESS
from wmtp.errors import ConfigError
from wmtp.evaluation import Estimate, Evaluator, Measured
from wmtp.evaluation.measure import measure
from wmtp.models.config import ScratchModel
from wmtp.models.mtp import MTPModel
from wmtp.testing.component import ComponentTests
from wmtp.testing.steps import HORIZON, random_step
from wmtp.tokenizers.config import Bytes

__all__ = ["EvaluatorTests"]


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    """Select rows as a batch with their own documents only.

    A row holds one document.
    """
    some = batch.rows(start, stop)
    numbers = [int(row.max()) for row in some.document]
    own = torch.where(some.document == PADDING, PADDING, torch.arange(len(numbers)).unsqueeze(1))
    return evolve(some, document=own, documents=[batch.documents[number] for number in numbers])


class EvaluatorTests(ComponentTests):
    """Contract tests of an evaluator.

    Correctness of its numbers is for the plugin's own tests.

    Args:
        varies: names of numbers that may differ from one measurement to the next: those that depend on a clock or the machine.
    """

    __test__ = False
    kind = "evaluators"
    varies: ClassVar[frozenset[str]] = frozenset()

    @pytest.fixture
    def measured(self) -> Measured:
        """Make a tiny model, a byte tokenizer and four documents.

        The model is a random Llama with three heads.
        """
        shape = ScratchModel(
            vocab_size=258, hidden_size=16, layers=2, attention_heads=2, intermediate_size=24, max_positions=256
        )
        base = shape.build().load(None, dtype=torch.float32, seed=0).model
        model = MTPModel(cast(Any, base), HeadsConfig(horizon=HORIZON, init="random"), seed=0).eval()
        rows = random_step(0, packed=False).batch
        return Measured(
            model=model,
            tokenizer=Bytes().build(None),
            batches=[_rows(rows, 0, 2), _rows(rows, 2, 4)],
            device=torch.device("cpu"),
            autocast=nullcontext,
            seed=0,
            allow_code_execution=self.config.executes_code,
        )

    def measure(self, measured: Measured) -> dict[str, float]:
        """Measure once, and leave out the numbers that vary."""
        found = self.config.build().evaluate(measured)
        return {name: float(value) for name, value in found.items() if name not in self.varies}

    def test_numbers_by_name(self, measured: Measured) -> None:
        """At least one number; an interval holds its number, n and unit."""
        evaluator = self.config.build()
        assert isinstance(evaluator, Evaluator)
        found = evaluator.evaluate(measured)
        assert isinstance(found, Mapping)
        assert any("/" not in name for name in found), "every name is a detail: one without a '/' is a number of the run"
        assert self.varies <= found.keys(), f"varies: {set(self.varies - found.keys())} is no number of this evaluator"
        for name, value in found.items():
            assert isinstance(name, str)
            assert name.strip("/ ") == name != "", f"{name!r} is no name"
            assert isinstance(value, float | int | Estimate), f"{name} is a {type(value).__name__}"
            if isinstance(value, Estimate):
                assert value.n >= 1, f"{name}: an interval over nothing"
                assert value.unit.strip(), f"{name}: n of what?"
                if math.isfinite(value.value):
                    assert value.low <= value.value <= value.high, f"{name} is outside of its interval"

    def test_again_gives_the_same(self, measured: Measured) -> None:
        """A second measurement gives the same numbers.

        Chance comes from ``measured.seed`` alone, and nothing is kept from the measurement before.
        """
        torch.manual_seed(1)
        first = self.measure(measured)
        torch.manual_seed(2)
        assert self.measure(measured) == pytest.approx(first, rel=1e-6, nan_ok=True), "the second measurement differs"
        assert self.measure(evolve(measured, ranks=SINGLE_PROCESS)) == pytest.approx(first, rel=1e-6, nan_ok=True)

    def test_batches_change_nothing(self, measured: Measured) -> None:
        """Numbers do not depend on the split into batches.

        A mean of means would.

        A mean of means would depend on it.
        """
        expected = self.measure(measured)
        count = sum(len(batch.input_ids) for batch in measured.batches)
        if count < 2:
            pytest.skip("no batches")
        single = [_rows(batch, row, row + 1) for batch in measured.batches for row in range(len(batch.input_ids))]
        assert self.measure(evolve(measured, batches=single)) == pytest.approx(expected, rel=1e-3, abs=1e-6, nan_ok=True)

    def test_the_model_stays_as_it_is(self, measured: Measured) -> None:
        """An evaluator leaves the model unchanged for the next one."""
        model = measured.model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        learns = [parameter.requires_grad for parameter in model.parameters()]
        self.measure(measured)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} was changed"
        assert not model.training, "the model is no longer in eval mode"
        assert [parameter.requires_grad for parameter in model.parameters()] == learns
        assert all(parameter.grad is None for parameter in model.parameters()), "gradients are left behind: use torch.no_grad"

    def test_files_only_where_they_may_be(
        self, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Files go to ``output_dir`` only, and nothing to standard output.

        Standard output belongs to ``--json``.
        """
        here, there = tmp_path / "here", tmp_path / "there"
        here.mkdir()
        monkeypatch.chdir(here)
        expected = self.measure(measured)
        assert list(here.iterdir()) == [], "files in the working folder"
        assert self.measure(evolve(measured, output_dir=there)) == pytest.approx(expected, rel=1e-6, nan_ok=True)
        again = self.measure(evolve(measured, output_dir=there))
        assert again == pytest.approx(expected, rel=1e-6, nan_ok=True), "what the first measurement left changed the second"
        assert list(here.iterdir()) == []
        assert set(tmp_path.iterdir()) <= {here, there}
        assert capfd.readouterr().out == ""

    def test_a_run_keeps_what_it_finds(self, measured: Measured, tmp_path: Path) -> None:
        """As ``[[eval]]`` measures: numbers into ``evaluation.json``, the rest beside it."""
        numbers = measure([self.config], measured, tmp_path)
        kept = json.loads((tmp_path / "evaluation.json").read_text())
        assert kept.keys() == numbers.keys()
        assert all(name.startswith(f"{self.config.type}/") for name in kept)
        assert json.loads((tmp_path / "evaluation-details.json").read_text())[self.config.type]["results"]

    def test_code_of_the_model_runs_only_where_the_user_says_so(self, measured: Measured) -> None:
        """An evaluator with ``executes_code = True`` refuses to run code without consent."""
        if not self.config.executes_code:
            pytest.skip("executes_code is not set")
        with pytest.raises(ConfigError, match="allow-code-execution"):
            self.config.build().evaluate(evolve(measured, allow_code_execution=False))
