"""One optimizer step stays readable: it enters few files."""

import pytest
from step_files import count


@pytest.mark.parametrize(
    ("trainer", "micro_batches", "models", "most"),
    [("baseline-mtp", 1, ("base",), 15), ("rho1-wmtp", 2, ("base", "ref"), 18)],
)
def test_a_step_enters_few_files(tmp_path, trainer, micro_batches, models, most):
    found = count({"type": trainer}, tmp_path, micro_batches=micro_batches, models=models)
    assert {"wmtp/training/loop.py", "wmtp/training/step.py", "wmtp/loss/cross_entropy.py"} <= found.step.keys()
    assert len(found.step) <= most, "\n".join(sorted(found.step))
