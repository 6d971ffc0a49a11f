"""Random batches, and the views that a trainer is given, for `TrainerTests`."""

from __future__ import annotations

import copy
import functools

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from wmtp.data.batch import PADDING, Batch, Document, align_targets
from wmtp.loss import Unembedding
from wmtp.trainers.base import HiddenView, StepView, Trainer

__all__ = ["HIDDEN_SIZE", "HORIZON", "VOCAB_SIZE", "Step", "make_view", "pad", "random_step", "tiny_model"]

VOCAB_SIZE = 61
HIDDEN_SIZE = 16
HORIZON = 3


@frozen(kw_only=True, eq=False)
class Step:
    """One optimizer step's inputs.

    Args:
        batch: B rows of S tokens.
        trunk: ``[B, S, D]``.
        token_loss: ``[B, S, H]``; only its valid places count.
        entropy: ``[B, S, H]``; likewise.
    """

    batch: Batch
    trunk: Tensor
    token_loss: Tensor
    entropy: Tensor


def random_step(seed: int, *, packed: bool, rows: int = 4, length: int = 12) -> Step:
    """Make a ragged batch of random documents.

    Documents have any length from one token up, with and without a prompt, some with a user's turn between two answers, and
    rows end in padding. Each document has a label, a reward and data weights, and belongs to a group with others. One document
    has nothing to learn.
    """
    draw = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    shape = (rows, length)
    document = torch.full(shape, PADDING)
    position = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    documents: list[Document] = []
    for row in range(rows):
        start = 0
        # the first row is full, so that padding the batch changes its shape and nothing else
        end = length if row == 0 else integer(2, length + 1)
        while start < end:
            stop = min(end, start + integer(1, length // 2)) if packed else end
            number = len(documents)
            prompt = stop - start if number == 1 else integer(0, (stop - start + 1) // 2 + 1)
            document[row, start:stop] = number
            position[row, start:stop] = torch.arange(stop - start)
            loss_mask[row, start + prompt : stop] = True
            if stop - start - prompt > 3:  # a conversation: something between two answers is not learned
                loss_mask[row, start + prompt + 1 + number % 2 : stop - 1] = False
            label = number % 2 == 0
            documents.append(
                Document(index=number, start=0, id=f"d{number}", group=f"g{number // 2}", is_correct=label, reward=float(label))
            )
            start = stop
    batch = Batch(
        input_ids=torch.randint(0, VOCAB_SIZE, shape, generator=draw),
        document=document,
        position=position,
        loss_mask=loss_mask,
        documents=documents,
        weight=torch.rand(shape, generator=draw),
    )
    return Step(
        batch=batch,
        trunk=torch.randn(*shape, HIDDEN_SIZE, generator=draw),
        token_loss=3 * torch.rand(*shape, HORIZON, generator=draw),
        entropy=2 * torch.rand(*shape, HORIZON, generator=draw),
    )


def pad(step: Step, *, columns: int, rows: int) -> Step:
    """Pad a step further, with other values than in its present padding."""

    def grown(values: Tensor, fill: float) -> Tensor:
        count, length, *rest = values.shape
        out = values.new_full((count + rows, length + columns, *rest), fill)
        out[:count, :length] = values
        return out

    batch = step.batch
    weight = batch.weight
    padded = evolve(
        batch,
        input_ids=grown(batch.input_ids, VOCAB_SIZE - 1),
        document=grown(batch.document, PADDING),
        position=grown(batch.position, 0),
        loss_mask=grown(batch.loss_mask, False),
        weight=None if weight is None else grown(weight, 7.0),
    )
    return evolve(
        step,
        batch=padded,
        trunk=grown(step.trunk, 5.0),
        token_loss=grown(step.token_loss, 2.0),
        entropy=grown(step.entropy, 2.0),
    )


def make_view(trainer: Trainer, step: Step, *, number: int = 0, stage: str = "train", with_gradient: bool = False) -> StepView:
    """Make the view of one step, as the loop gives it.

    Args:
        trainer: set up.
        step: its inputs.
        number: the optimizer step.
        stage: the stage's name.
        with_gradient: whether observations lead back to the trainer's modules.
    """
    targets = align_targets(step.batch, HORIZON)
    real = step.batch.document != PADDING
    with torch.set_grad_enabled(with_gradient):
        seen = trainer.observe(
            HiddenView(
                batch=step.batch,
                targets=targets,
                packed=step.batch.packed,
                stage=stage,
                trunk=step.trunk.clone(),
                hidden=[step.trunk.roll(head, dims=-1) for head in range(HORIZON)],
                unembeddings=[_unembedding()] * HORIZON,
            )
        )
        observations = {
            name: torch.where(real if value.ndim == 2 else real.unsqueeze(-1), value, 0.0) for name, value in seen.items()
        }
    return StepView(
        batch=step.batch,
        targets=targets,
        token_loss=torch.where(targets.valid, step.token_loss, 0.0) if trainer.needs_token_loss else None,
        entropy=torch.where(targets.valid, step.entropy, 0.0) if trainer.needs_entropy else None,
        observations=observations,
        step=number,
        stage=stage,
        generator=torch.Generator().manual_seed(number),
        vocab_size=VOCAB_SIZE,
    )


def _unembedding() -> Unembedding:
    return Unembedding(weight=torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)))


def tiny_model(*, seed: int = 0) -> nn.Module:
    """Make a Llama of two layers with random weights."""
    return copy.deepcopy(_tiny_model(seed))


@functools.cache
def _tiny_model(seed: int) -> nn.Module:
    from wmtp.models.config import ScratchModel

    shape = ScratchModel(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, layers=2, attention_heads=2, intermediate_size=24, max_positions=64
    )
    return shape.build().load(None, dtype=torch.float32, seed=seed).model
