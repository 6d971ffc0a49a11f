"""Contract of trainers, and what makes these: against plain Python."""

import torch

from wmtp import TrainerTests, make_view, random_step
from wmtp_example.loss_ceiling import LossCeiling
from wmtp_example.loss_truncation import LossTruncation


class TestLossCeiling(TrainerTests):
    config = LossCeiling(ceiling=1.0)


class TestLossTruncation(TrainerTests):
    config = LossTruncation(drop=0.3, window=7, warmup_steps=0)


def test_no_prediction_adds_more_than_the_ceiling():
    trainer = LossCeiling(ceiling=1.0)
    view = make_view(trainer, random_step(0, packed=True))
    weights = trainer.token_weights(view)
    losses = view.token_loss[view.targets.valid].tolist()
    assert max(losses) > 1 > min(losses)
    expected = [1.0 if loss <= 1 else 1 / loss for loss in losses]
    torch.testing.assert_close(weights[view.targets.valid], torch.tensor(expected))


def test_documents_above_the_quantile_of_the_last_ones_are_left_out():
    trainer = LossTruncation(drop=0.25, window=6, warmup_steps=1).build()
    last = []
    for number in range(8):
        view = make_view(trainer, random_step(number, packed=True), number=number)
        losses = {}
        for document in range(len(view.batch.documents)):
            inside = view.targets.valid & (view.batch.document == document).unsqueeze(-1)
            if inside.any():
                losses[document] = float(view.token_loss[inside].mean())
        last = (last + list(losses.values()))[-6:]
        weights = trainer.token_weights(view)
        if number == 0:
            assert weights.eq(1).all(), "all is learned during the warm-up"
            continue
        ordered = sorted(last)
        place = 0.75 * (len(ordered) - 1)
        low = ordered[int(place)]
        threshold = low + (place - int(place)) * (ordered[min(int(place) + 1, len(ordered) - 1)] - low)
        for document, loss in losses.items():
            found = weights[view.batch.document == document]
            expected = float(loss <= threshold or loss == min(losses.values()))
            assert torch.equal(found, torch.full_like(found, expected))
