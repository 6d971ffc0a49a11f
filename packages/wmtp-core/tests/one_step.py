"""Helpers for tests of one optimizer step: a small model in float64, ragged batches, a plain reference, and trainers."""

import contextlib

import torch

from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import PADDING, Batch, Document
from wmtp.models.build import build_model
from wmtp.models.config import ScratchModel
from wmtp.trainers import Stage, Trainer, TrainerSetup
from wmtp.training.step import StepLoss

VOCAB = 23
SMALL = ScratchModel(vocab_size=VOCAB, hidden_size=16, layers=2, attention_heads=2, max_positions=64, intermediate_size=24)


def make_model(**heads):
    loaded = SMALL.build().load(None, dtype=torch.float64, seed=1)
    model = build_model(loaded, HeadsConfig(**{"horizon": 3, "init": "random"} | heads), 5).double().eval()
    with torch.no_grad():  # away from the symmetric start, where many mistakes do not show
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def make_batch(rows=5, length=14, *, packed, seed=0, pad_columns=0, pad_rows=0):
    """Ragged rows: documents of random lengths, with a prompt at the start of each, and padding at the end of the row."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, length), generator=g)
    document = torch.full((rows, length), PADDING)
    position = torch.zeros((rows, length), dtype=torch.int64)
    loss_mask = torch.zeros((rows, length), dtype=torch.bool)
    documents = []
    for row in range(rows):
        at = 0
        for _ in range(3 if packed else 1):
            size = (
                int(torch.randint(1, length - 2 if not packed else 6, (1,), generator=g))
                if row
                else length
                if not packed
                else 4
            )
            size = min(size, length - at)
            if size < 1:
                break
            prompt = int(torch.randint(0, size, (1,), generator=g))
            document[row, at : at + size] = len(documents)
            position[row, at : at + size] = torch.arange(size)
            loss_mask[row, at + prompt : at + size] = True
            documents.append(Document(index=len(documents), start=0, id=f"d{len(documents)}", group=f"g{len(documents) // 2}"))
            at += size
    pad = lambda t, value: torch.nn.functional.pad(t, (0, pad_columns, 0, pad_rows), value=value)
    return Batch(
        input_ids=pad(ids, 7),
        document=pad(document, PADDING),
        position=pad(position, 0),
        loss_mask=pad(loss_mask, False),
        documents=documents,
    )


def step_loss(model, trainer, micro=99, normalizer="sum_w"):
    trainer.setup(
        TrainerSetup(
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            horizon=model.horizon,
            device=torch.device("cpu"),
            seed=0,
            tokenizer=None,
            model=None,
            token_numbers=None,
        )
    )
    return StepLoss(
        model=model,
        trainer=trainer,
        trainer_name="trainer 'mine' (mine 1.0)",
        micro_batch_size=micro,
        normalizer=normalizer,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        seed=4,
    )


def gradients(model, trainer, batch, *, stage=None, **kwargs):
    modules = {}
    model.zero_grad(set_to_none=True)
    loss = step_loss(model, trainer, **kwargs)
    modules = dict(trainer.modules())
    for module in modules.values():
        module.double().zero_grad(set_to_none=True)
    output = loss(batch, 3, stage or Stage())
    named = [*model.named_parameters(), *((f"{n}.{k}", p) for n, m in modules.items() for k, p in m.named_parameters())]
    return output, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(left, right, tolerance=1e-9):
    (out_a, grads_a), (out_b, grads_b) = left, right
    torch.testing.assert_close(out_a.loss, out_b.loss, rtol=1e-6, atol=0)  # it is added in fp32
    assert grads_a.keys() == grads_b.keys()
    for name in grads_a:
        torch.testing.assert_close(
            grads_a[name], grads_b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class Baseline(Trainer):
    pass


class ByToken(Trainer):
    """A weight for each token: far from constant, zero for some."""

    def token_weights(self, view):
        return (view.batch.input_ids % 5).float()


class ByPrediction(Trainer):
    def token_weights(self, view):
        rows, length, horizon = view.targets.ids.shape
        k = torch.arange(1, horizon + 1)
        return (view.targets.ids % 4 + k).float()


class HardHalf(Trainer):
    """Keeps the half of the valid predictions that are hardest: needs the losses of the whole batch."""

    needs_token_loss = True

    def token_weights(self, view):
        valid = view.targets.valid
        return (view.token_loss >= view.token_loss[valid].median()).float()


class Valued(Trainer):
    """A value head whose loss whitens over the whole batch, and whose values weigh the tokens."""

    def setup(self, setup):
        torch.manual_seed(0)
        self.head = torch.nn.Linear(setup.hidden_size, 1).double()

    def modules(self):
        return {"value": self.head}

    def observe(self, view):
        return {"value": self.head(view.trunk.detach()).squeeze(-1)}

    def token_weights(self, view):
        value, real = view.observations["value"], view.batch.document != PADDING
        z = (value - value[real].mean()) / value[real].std()
        return torch.exp(z).clamp(0.1, 3)

    def auxiliary_losses(self, view):
        value, real = view.observations["value"], view.batch.document != PADDING
        return {"value": ((value[real] - value[real].mean() - 1) ** 2).mean() + value[real].max()}


class Unsure(Trainer):
    """Weighs by the entropy of the two most probable tokens; learns nothing of the rest."""

    needs_entropy = True
    entropy_top_k = 2

    def token_weights(self, view):
        return torch.where(view.entropy > 0.5, view.entropy, 0.0)


def head_objective(model, logits, b, t, k):
    """The objective of head k ≥ 2 at t: against head 1's distribution at t+k−1, which is a constant."""
    q, p = logits[k - 1][b, t].softmax(-1), logits[0][b, t + k - 1].detach().softmax(-1)
    kl, overlap = (p * (p / q).log()).sum(), torch.minimum(p, q).sum()
    share = torch.exp(-model.heads.lk_eta * overlap.detach())
    return {"kl": kl, "tv": 1 - overlap, "lk": share * kl + (1 - share) * (1 - overlap)}[model.heads.objective]


def reference(model, batch, weight_of, alpha, normalizer="sum_w"):
    """Σ α w CE / Z by loops over rows, positions and heads; of heads 2..H the objective in place of CE."""
    output = model(batch.input_ids, batch.position, batch.packed)
    logits = [model.logits(output, k) for k in range(1, model.horizon + 1)]
    rows, length = batch.input_ids.shape
    terms = []
    for b in range(rows):
        for t in range(length):
            for k in range(1, model.horizon + 1):
                j = t + k
                if batch.document[b, t] == PADDING or j >= length:
                    continue
                if batch.document[b, j] != batch.document[b, t] or not batch.loss_mask[b, j]:
                    continue
                if k > 1 and model.heads.objective != "ce":
                    ce = head_objective(model, logits, b, t, k)
                else:
                    ce = -torch.log_softmax(logits[k - 1][b, t], -1)[batch.input_ids[b, j]]
                terms.append((b, t, k, alpha[k - 1], weight_of(b, t, k, int(batch.input_ids[b, j])), ce))
    if normalizer == "per_position":
        places = {}
        for b, t, _, a, w, ce in terms:
            top, bottom = places.get((b, t), (0.0, 0.0))
            places[b, t] = (top + a * w * ce, bottom + a * w)
        alive = [(top, bottom) for top, bottom in places.values() if bottom > 0]
        return sum(top / bottom for top, bottom in alive) / len(alive)
    z = sum(a * (w if normalizer == "sum_w" else 1.0) for _, _, _, a, w, _ in terms)
    return sum(a * w * ce for _, _, _, a, w, ce in terms) / z
