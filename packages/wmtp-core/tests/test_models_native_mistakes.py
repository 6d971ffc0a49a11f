"""Mistakes that other trainers of these layers made: the loss is compared with a plain one, and each mistake must show.

The plain loss is taken document by document, so that packing, padding and alignment are not in it at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attrs import evolve
from native_folders import VOCAB, native_folder
from native_plain import plain_logits
from one_step import make_batch, step_loss
from torch import Tensor

from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import PADDING, Batch, Targets, align_targets
from wmtp.models import MTPModel, build_model
from wmtp.models.loaders.hf import HfLoader
from wmtp.trainers import Stage, StepView, Trainer, checks
from wmtp.training import step as steps

HORIZON = 3
ALPHA = (1.0, 0.5, 0.25)


class OwnWeights(Trainer):
    """A weight for every token, which belongs to the predictions of that token."""

    def token_weights(self, view: StepView) -> Tensor:
        return own_weights(view.batch.input_ids)


def own_weights(ids: Tensor) -> Tensor:
    return 0.25 + (ids * 7919 % 13).double() / 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_folder(tmp_path_factory.mktemp("mistakes") / "mimo", "mimo")


@pytest.fixture
def model(folder: Path) -> MTPModel:
    heads = HeadsConfig(horizon=HORIZON, head_weights=ALPHA)
    return build_model(HfLoader().load(folder, dtype=torch.float64, seed=0), heads, seed=0).eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Packed documents with prompts, and padding at the end of rows."""
    made = make_batch(rows=3, packed=True, pad_columns=2)
    return evolve(made, input_ids=made.input_ids * 11 % VOCAB)


@pytest.fixture(scope="module")
def expected(folder: Path, batch: Batch) -> float:
    total = weight = 0.0
    for number in batch.document.unique().tolist():
        if number == PADDING:
            continue
        ids, loss_mask = batch.input_ids[batch.document == number], batch.loss_mask[batch.document == number]
        with torch.no_grad():
            logits = plain_logits("mimo", folder, ids[None], HORIZON)
        for k in range(1, HORIZON + 1):
            for t in range(len(ids) - k):
                if loss_mask[t + k]:
                    w = float(own_weights(ids[t + k]))
                    total -= ALPHA[k - 1] * w * float(logits[k - 1][0, t].log_softmax(-1)[ids[t + k]])
                    weight += ALPHA[k - 1] * w
    return total / weight


def loss_of(model: MTPModel, batch: Batch) -> float:
    return float(step_loss(model, OwnWeights())(batch, 3, Stage()).loss)


def test_the_loss_is_that_of_each_document_alone(model: MTPModel, batch: Batch, expected: float):
    assert loss_of(model, batch) == pytest.approx(expected, rel=1e-5)


def _everywhere(batch: Batch, horizon: int) -> Targets:
    return evolve(align_targets(batch, horizon), valid=torch.ones(*batch.input_ids.shape, horizon, dtype=torch.bool))


def _prompts_too(batch: Batch, horizon: int) -> Targets:
    return align_targets(evolve(batch, loss_mask=batch.document != PADDING), horizon)


def _one_off(batch: Batch, horizon: int) -> Targets:
    return align_targets(evolve(batch, loss_mask=batch.loss_mask.roll(1, dims=1)), horizon)


def _across_documents(batch: Batch, horizon: int) -> Targets:
    one = torch.where(batch.document == PADDING, PADDING, 0)
    return align_targets(evolve(batch, document=one), horizon)


def _not_rolled(values: Tensor, horizon: int) -> Tensor:
    return values.unsqueeze(-1).expand(*values.shape, horizon)


def _fed(**change: object) -> Callable[[MTPModel, pytest.MonkeyPatch], None]:
    def apply(model: MTPModel, patch: pytest.MonkeyPatch) -> None:
        block = model.extra_heads[0]
        block.rule = evolve(block.rule, **change)

    return apply


def _aligned(by: Callable[[Batch, int], Targets]) -> Callable[[MTPModel, pytest.MonkeyPatch], None]:
    return lambda _, patch: patch.setattr(steps, "align_targets", by)


def _one_document(model: MTPModel, patch: pytest.MonkeyPatch) -> None:
    plain = model.forward
    patch.setattr(model, "forward", lambda ids, positions, packed, **more: plain(ids, positions, False, **more))


#: what was done, and where; the names are those in docs/correctness.md
MISTAKES: dict[str, Callable[[MTPModel, pytest.MonkeyPatch], None]] = {
    "loss over padding": _aligned(_everywhere),
    "loss over prompts": _aligned(_prompts_too),
    "mask one token off": _aligned(_one_off),
    "targets across packed documents": _aligned(_across_documents),
    "attention across packed documents": _one_document,
    "loss weights not moved with the labels": lambda _, patch: patch.setattr(checks, "shift_to_predictions", _not_rolled),
    "wrong hidden state: after the norm in place of before": _fed(before_norm=False),
    "halves of the projection swapped": _fed(embedding_first=True),
    "the embedding at position 0 that a server leaves out": _fed(zero_first=False),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str, model: MTPModel, batch: Batch, expected: float, monkeypatch: pytest.MonkeyPatch):
    MISTAKES[mistake](model, monkeypatch)
    assert loss_of(model, batch) != pytest.approx(expected, rel=1e-4)


def test_the_page_lists_every_mistake():
    page = (Path(__file__).parents[3] / "docs/correctness.md").read_text(encoding="utf-8")
    assert not [mistake for mistake in MISTAKES if mistake not in page]
