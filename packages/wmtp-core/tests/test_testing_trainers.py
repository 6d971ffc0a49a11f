"""`TrainerTests` passes sound trainers, and fails each kind of broken one."""

import inspect
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import nn

from wmtp.errors import PluginError
from wmtp.plugins.contract import TrainerConfig
from wmtp.testing import TrainerTests
from wmtp.testing.steps import random_step
from wmtp.trainers import Stage, Trainer


def config_of(trainer_class, **class_variables):
    """A config class for a trainer class."""

    @attrs.frozen(kw_only=True)
    class TestedTrainer(TrainerConfig):
        type: ClassVar[str] = "tested"

        def build(self):
            return trainer_class()

    return TestedTrainer()


class Uniform(Trainer):
    pass


class HardTokens(Trainer):
    """A bit of everything: token losses, a module with a loss of its own, two stages, state, random numbers."""

    needs_token_loss = True

    def setup(self, setup):
        self.head = nn.Linear(setup.hidden_size, 1)
        self.mean = torch.zeros(())

    def modules(self):
        return {"head": self.head}

    def stages(self):
        return (Stage(name="head", steps=2, frozen=frozenset({"model", "heads"}), model_loss=False), Stage())

    def observe(self, view):
        return {"value": self.head(view.trunk.detach()).squeeze(-1)}

    def token_weights(self, view):
        valid = view.targets.valid
        losses = view.token_loss
        mean = losses[valid].mean() if valid.any() else losses.new_zeros(())
        self.mean = 0.9 * self.mean + 0.1 * mean
        noise = torch.ones_like(losses)
        noise[valid] += torch.rand(int(valid.sum()), generator=view.generator)
        return noise * torch.sigmoid(losses - self.mean)

    def auxiliary_losses(self, view):
        return {"value": (view.observations["value"] ** 2)[view.batch.loss_mask].sum() / view.batch.loss_mask.sum()}

    def metrics(self):
        return {"hard/mean": self.mean}

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


class TestUniform(TrainerTests):
    config = config_of(Uniform)
    registered = False


class TestHardTokens(TrainerTests):
    config = config_of(HardTokens)
    registered = False


def weighing(function):
    """A trainer whose weights are ``function(view)``."""

    class Weighing(Trainer):
        needs_token_loss = True

        def token_weights(self, view):
            return function(view)

    return Weighing


def counting():
    """A trainer that forgets to save what its weights depend on."""

    class Counting(Trainer):
        calls = 0

        def token_weights(self, view):
            self.calls += 1
            return torch.full(view.batch.input_ids.shape, float(self.calls))

    return Counting


class DetailsOfOtherShape(Trainer):
    def token_details(self, view):
        return {"value": view.batch.input_ids[:, 1:].float()}


class PerMicroBatch(Trainer):
    """Normalizes what it observes over the micro-batch instead of over the step."""

    def observe(self, view):
        norm = view.trunk.detach().norm(dim=-1)
        return {"norm": norm / norm.sum()}

    def token_weights(self, view):
        return view.observations["norm"]


def run_test(suite, name, **arguments: Any):
    getattr(suite, name)(**arguments)


ones = lambda view: torch.ones(view.batch.input_ids.shape)


@pytest.mark.parametrize(
    ("trainer_class", "test", "arguments"),
    [
        (weighing(lambda view: -ones(view)), "test_weights_keep_the_contract", {"packed": True, "seed": 0}),
        (weighing(lambda view: ones(view) * float("nan")), "test_weights_keep_the_contract", {"packed": True, "seed": 0}),
        (weighing(lambda view: ones(view) * 0), "test_weights_keep_the_contract", {"packed": False, "seed": 0}),
        (weighing(lambda view: ones(view)[:, :-1]), "test_weights_keep_the_contract", {"packed": False, "seed": 0}),
        (weighing(lambda view: ones(view).requires_grad_()), "test_weights_keep_the_contract", {"packed": False, "seed": 0}),
        (weighing(lambda view: torch.rand_like(ones(view))), "test_weights_are_the_same_each_time", {"packed": True}),
        (
            weighing(lambda view: torch.rand(ones(view).shape, generator=view.generator)),
            "test_padding_changes_nothing",
            {"packed": False, "columns": 5, "rows": 0},
        ),
        (
            weighing(lambda view: ones(view) / ones(view).numel()),
            "test_padding_changes_nothing",
            {"packed": True, "columns": 0, "rows": 2},
        ),
        (weighing(lambda view: view.token_loss.mul_(2)), "test_inputs_stay_as_they_are", {"packed": True}),
        (
            weighing(lambda view: ones(view) * view.token_loss[view.targets.valid].max()),
            "test_a_step_with_nothing_to_learn",
            {},
        ),
        (counting(), "test_state_survives_a_checkpoint", {}),
        (DetailsOfOtherShape, "test_token_details", {"packed": True}),
        (PerMicroBatch, "test_micro_batches_change_nothing", {"packed": False}),
    ],
)
def test_a_broken_trainer_fails(trainer_class, test, arguments):
    class Suite(TrainerTests):
        config = config_of(trainer_class)

    suite = Suite()
    if "trainer" in inspect.signature(getattr(suite, test)).parameters:
        arguments = {"trainer": suite.make_trainer(), **arguments}
    with pytest.raises((AssertionError, PluginError, RuntimeError)):
        run_test(suite, test, **arguments)
    sound = type("Sound", (TrainerTests,), {"config": config_of(Uniform)})()
    if "trainer" in arguments:
        arguments["trainer"] = sound.make_trainer()
    run_test(sound, test, **arguments)


def test_constant_weights_learn_what_uniform_ones_do():
    """Constant weights of any size give the baseline's loss and gradients."""
    step = random_step(0, packed=True)
    found = []
    for trainer_class in (Uniform, weighing(lambda view: 3.0 * ones(view))):
        suite = type("Suite", (TrainerTests,), {"config": config_of(trainer_class)})()
        found.append(suite._learn(step, Stage(), micro_batch_size=2))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-7)


def test_batches_cover_what_trainers_meet():
    packed = random_step(0, packed=True).batch
    assert packed.packed
    assert not random_step(0, packed=False).batch.packed
    assert (packed.document == -1).any()
    assert not packed.loss_mask[packed.document == 1].any(), "a document with nothing to learn"


def test_suites_are_collected_only_where_they_are_inherited():
    assert TrainerTests.__test__ is False
    assert TestUniform.__test__ is True
