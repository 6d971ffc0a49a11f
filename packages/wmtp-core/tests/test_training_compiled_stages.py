"""Stages change what learns: compiled layers must follow, in every precision, whatever is tied, frozen or packed.

What torch.compile overlooks differs by torch's version, so run this file with the lowest supported one too.
"""

import pytest
import torch
from attrs import evolve
from one_step import VOCAB, Valued, make_batch, step_loss
from torch import nn

from wmtp.config.schema import HeadsConfig
from wmtp.devices import autocast_context
from wmtp.models.acceleration import checkpoint_activations, compile_layers
from wmtp.models.build import build_model
from wmtp.models.config import ScratchModel
from wmtp.optim.config import AdamW
from wmtp.optim.master_weights import MasterWeights
from wmtp.trainers import Stage
from wmtp.training.stages import apply_stage

SHAPE = ScratchModel(vocab_size=VOCAB, hidden_size=16, layers=2, attention_heads=2, max_positions=64, intermediate_size=24)
CPU = torch.device("cpu")

MODEL, HEADS = frozenset({"model"}), frozenset({"heads"})
STAGES = [
    Stage(name="head-warmup", frozen=MODEL),
    Stage(),
    Stage(name="value", frozen=MODEL | HEADS, model_loss=False),
    Stage(name="again"),
]


class Value(Valued):
    def setup(self, setup):
        super().setup(setup)
        self.head.float()

    def observe(self, view):
        return {"value": self.head(view.trunk.detach().float()).squeeze(-1)}


def train(*, precision, tied, packed, compiled=False, checkpointing="none"):
    """A step in each stage, two in the first: the losses, and the names of the parameters that moved."""
    loaded = evolve(SHAPE, tie_embeddings=tied).build().load(None, dtype=torch.float32, seed=1)
    model = build_model(loaded, HeadsConfig(horizon=2, init="random"), 5).eval()
    masters = MasterWeights(model) if precision == "bf16-params" else None
    checkpoint_activations(model, checkpointing)
    if compiled:
        compile_layers(model)
    trainer = Value()
    loss = evolve(step_loss(model, trainer, 3), autocast=autocast_context(precision, CPU), master_weights=masters)
    modules = dict(trainer.modules())
    named = [*model.named_parameters(), *((f"{n}.{k}", p) for n, m in modules.items() for k, p in m.named_parameters())]
    names, parameters = zip(*named, strict=True)
    if masters is not None:
        parameters = masters.replace(parameters)
    optimizer = AdamW(lr=1e-2, eps=1e-3, weight_decay=0.0).build(list(zip(names, parameters, strict=True)))
    if masters is not None:
        optimizer = masters.take_over(optimizer)
    losses, moved = [], []
    for number, stage in enumerate(STAGES):
        apply_stage(stage, model, modules, "tested")
        before = [parameter.detach().clone() for parameter in parameters]
        for step in range(1 if number else 2):
            optimizer.zero_grad(set_to_none=True)
            output = loss(make_batch(packed=packed, seed=2 * number + step), step, stage)
            optimizer.step()
            losses.append(float(output.loss))
        moved.append({n for n, p, b in zip(names, parameters, before, strict=True) if not torch.equal(p, b)})
    return losses, moved


def expected_to_move(stage, names):
    parts = {"base": "model", "extra_heads": "heads", "value": "value"}
    return {
        name
        for name in names
        if (part := parts[name.partition(".")[0]]) not in stage.frozen and (stage.model_loss or part == "value")
    }


@pytest.mark.parametrize(
    ("precision", "tied", "packed", "checkpointing"),
    [
        pytest.param("fp32", True, True, "none", marks=pytest.mark.slow),
        pytest.param("bf16", True, False, "none", marks=pytest.mark.slow),
        pytest.param("bf16-params", False, False, "none", marks=pytest.mark.slow),
        ("bf16-params", True, True, "selective"),
    ],
)
def test_compiled_layers_learn_what_the_stage_lets_learn(without_the_compiler, precision, tied, packed, checkpointing):
    arguments = {"precision": precision, "tied": tied, "packed": packed}
    losses, moved = train(compiled=True, checkpointing=checkpointing, **arguments)
    expected, moved_eagerly = train(**arguments)
    assert moved == moved_eagerly
    everything = set.union(*moved) | {"value.weight", "value.bias"}
    for stage, found in zip(STAGES, moved, strict=True):
        assert found == expected_to_move(stage, everything), stage.name
    torch.testing.assert_close(losses, expected, rtol=1e-4 if precision == "fp32" else 2e-2, atol=0)


class _Passes(torch.autograd.Function):
    """Uses a weight, and hands on no gradient to it."""

    @staticmethod
    def forward(ctx, x, weight):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        return gradient, None


def test_a_parameter_that_is_handed_no_gradient_stays_as_it_is():
    """As in fp32, where the optimizer leaves out a parameter without gradient. Torch calls its hook all the same."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.learns, self.rests = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    model = Two()
    masters = MasterWeights(model)
    learns, rests = masters.replace([model.learns, model.rests])
    optimizer = masters.take_over(torch.optim.AdamW([learns, rests], lr=0.1))
    _Passes.apply(model.learns, model.rests).sum().backward()
    assert rests.grad is None
    optimizer.step()
    assert (learns < 1).all()
    assert (rests == 1).all()
