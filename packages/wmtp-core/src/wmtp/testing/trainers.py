"""Suite for trainers: the contract that the training loop relies on."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NoReturn, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import Targets, align_targets
from wmtp.models.mtp import MTPModel
from wmtp.testing.component import ComponentTests
from wmtp.testing.steps import HIDDEN_SIZE, HORIZON, VOCAB_SIZE, Step, make_view, pad, random_step, tiny_model
from wmtp.tokenizers.config import Bytes
from wmtp.trainers import checks
from wmtp.trainers.base import Stage, Trainer
from wmtp.trainers.checks import given_weights, token_details
from wmtp.trainers.declarations import check_trainer
from wmtp.trainers.setup import TrainerSetup
from wmtp.training.step import StepLoss

__all__ = ["TrainerTests"]

_KINDS = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


class TrainerTests(ComponentTests):
    """Contract tests of a trainer.

    The weights of a step are a function of that step's documents: padding, the split into micro-batches and what ran before
    (but for `Trainer.state_dict`) have no influence. Override `make_model` if the trainer needs a special ``[models.*]``.
    """

    __test__ = False
    kind = "trainers"

    def make_model(self, name: str) -> MTPModel:
        """Make the model ``[models.<name>]``: a tiny Llama with random weights."""
        return _model(seed=len(name), horizon=1).eval().requires_grad_(False)

    @pytest.fixture
    def trainer(self) -> Trainer:
        """A trainer that is set up."""
        return self.make_trainer()

    def make_trainer(self) -> Trainer:
        """Build and set up a trainer; always the same."""
        trainer = check_trainer(self.config.build(), type(self.config).__name__)

        def open_model(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> MTPModel:
            return self.make_model(name).to(dtype)

        with torch.random.fork_rng():
            torch.manual_seed(0)
            trainer.setup(
                TrainerSetup(
                    hidden_size=HIDDEN_SIZE,
                    vocab_size=VOCAB_SIZE,
                    horizon=HORIZON,
                    device=torch.device("cpu"),
                    seed=0,
                    tokenizer=Bytes().build(None),
                    model=open_model,
                    token_numbers=_no_numbers,
                )
            )
        return trainer

    # --- what it declares

    def test_stages(self, trainer: Trainer) -> None:
        """Stages have an end and unique names, and freeze what exists.

        Only the last may be without an end.
        """
        stages = list(trainer.stages())
        assert stages
        assert all(isinstance(stage, Stage) for stage in stages)
        assert all(stage.steps is not None and stage.steps > 0 for stage in stages[:-1])
        assert len({stage.name for stage in stages}) == len(stages)
        known = {"model", "heads", *trainer.modules()}
        for stage in stages:
            assert stage.frozen <= known, f"stage '{stage.name}' freezes {sorted(stage.frozen - known)}; known: {sorted(known)}"

    def test_modules(self, trainer: Trainer) -> None:
        """Modules are modules, keep their names, and start with finite weights."""
        for name, module in trainer.modules().items():
            assert isinstance(module, nn.Module), name
            assert all(torch.isfinite(parameter).all() for parameter in module.parameters()), name
        again = trainer.modules()
        assert all(again[name] is module for name, module in trainer.modules().items()), "modules() makes new modules each time"

    # --- the weights of one step

    @_KINDS
    @pytest.mark.parametrize("seed", range(3))
    def test_weights_keep_the_contract(self, trainer: Trainer, packed: bool, seed: int) -> None:
        """Weights are finite, ≥ 0, without gradient, and not all 0.

        They are ``[B, S]`` or ``[B, S, H]``.
        """
        step = random_step(seed, packed=packed)
        for stage in _weighted_stages(trainer):
            weights, valid = self._weights(trainer, step, stage=stage.name)
            assert torch.isfinite(weights[valid]).all(), "a weight is NaN or infinite"
            assert (weights[valid] >= 0).all(), "a weight is negative"
            assert (weights[valid] > 0).any(), "all weights are 0"
            view = make_view(trainer, step, stage=stage.name)
            eligible = checks.eligible(trainer, view, type(trainer).__name__)
            assert not weights[valid & ~eligible].any(), "a prediction that eligible() leaves out has a weight"

    @_KINDS
    def test_weights_are_the_same_each_time(self, packed: bool) -> None:
        """Random numbers come from ``view.generator`` only.

        A resumed run must get the same weights.
        """
        step = random_step(0, packed=packed)
        state = torch.get_rng_state()
        first, _ = self._weights(self.make_trainer(), step)
        assert torch.equal(torch.get_rng_state(), state), "torch's global random numbers were used; use view.generator"
        torch.rand(5)
        again, _ = self._weights(self.make_trainer(), step)
        assert torch.equal(first, again)

    @_KINDS
    @pytest.mark.parametrize(("columns", "rows"), [(5, 0), (0, 2), (3, 1)])
    def test_padding_changes_nothing(self, packed: bool, columns: int, rows: int) -> None:
        """More padding leaves the weights of real tokens as they are."""
        step = random_step(1, packed=packed)
        weights, valid = self._weights(self.make_trainer(), step)
        padded, padded_valid = self._weights(self.make_trainer(), pad(step, columns=columns, rows=rows))
        torch.testing.assert_close(padded[padded_valid], weights[valid], msg=lambda text: f"padding changes weights: {text}")

    @_KINDS
    def test_inputs_stay_as_they_are(self, trainer: Trainer, packed: bool) -> None:
        """A trainer does not change its inputs, which the loop still uses."""
        view = make_view(trainer, random_step(2, packed=packed), stage=_weighted_stages(trainer)[0].name)
        tensors = {
            "input_ids": view.batch.input_ids,
            "document": view.batch.document,
            "position": view.batch.position,
            "loss_mask": view.batch.loss_mask,
            "weight": view.batch.weight,
            "targets.ids": view.targets.ids,
            "targets.valid": view.targets.valid,
            "token_loss": view.token_loss if trainer.needs_token_loss else None,
            "entropy": view.entropy if trainer.needs_entropy else None,
            **view.observations,
        }
        before = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
        trainer.token_weights(view)
        trainer.auxiliary_losses(view)
        for name, tensor in before.items():
            now = cast(Tensor, tensors[name])
            assert torch.equal(now, tensor), f"{name} was changed in place"

    def test_a_step_with_nothing_to_learn(self, trainer: Trainer) -> None:
        """A batch of prompts only must not stop the run."""
        step = random_step(3, packed=False)
        step.batch.loss_mask.zero_()
        weights, valid = self._weights(trainer, step)
        assert not valid.any()
        assert torch.isfinite(weights).all()

    # --- what it learns and keeps

    @_KINDS
    def test_auxiliary_losses(self, trainer: Trainer, packed: bool) -> None:
        """Finite scalars; what they teach is finite too."""
        for stage in trainer.stages():
            view = make_view(trainer, random_step(4, packed=packed), stage=stage.name, with_gradient=True)
            for name, loss in trainer.auxiliary_losses(view).items():
                assert isinstance(loss, Tensor), name
                assert loss.numel() == 1, f"{name} is no scalar"
                assert torch.isfinite(loss).all(), f"{name} is {loss}"
                if loss.requires_grad:
                    loss.backward(retain_graph=True)
        for name, module in trainer.modules().items():
            for parameter in module.parameters():
                assert parameter.grad is None or torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"

    @_KINDS
    def test_token_details(self, trainer: Trainer, packed: bool) -> None:
        """Numbers for each token or for each prediction, in every stage."""
        for stage in trainer.stages():
            view = make_view(trainer, random_step(8, packed=packed), stage=stage.name)
            if stage.model_loss:
                trainer.token_weights(view)
            token_details(trainer, view, type(self.config).__name__)

    def test_metrics_are_scalars(self, trainer: Trainer) -> None:
        """`Trainer.metrics` returns scalars that can be logged."""
        self._weights(trainer, random_step(5, packed=True))
        for name, value in trainer.metrics().items():
            assert isinstance(name, str)
            assert isinstance(value, int | float) or value.numel() == 1, name
            assert not isinstance(value, Tensor) or not value.requires_grad, f"{name} keeps a graph alive; detach it"

    def test_state_survives_a_checkpoint(self) -> None:
        """A trainer with restored state continues as the original, in every stage."""
        one, two = self.make_trainer(), self.make_trainer()
        for number in range(3):
            for stage in one.stages():
                self._use(one, random_step(number, packed=True), stage, number=number)
        file = io.BytesIO()
        torch.save(one.state_dict(), file)
        file.seek(0)
        two.load_state_dict(torch.load(file, weights_only=True))
        for number in range(3, 5):
            for stage in one.stages():
                step = random_step(number, packed=False)
                left, right = (self._use(trainer, step, stage, number=number) for trainer in (one, two))
                assert left.keys() == right.keys()
                for name, value in left.items():
                    torch.testing.assert_close(
                        right[name], value, rtol=0, atol=0, equal_nan=True,
                        msg=f"state_dict() does not hold everything that later {name} depend on",
                    )  # fmt: skip

    def _use(self, trainer: Trainer, step: Step, stage: Stage, *, number: int) -> dict[str, Tensor]:
        """Return everything that the loop asks for in one step."""
        view = make_view(trainer, step, stage=stage.name)
        found = {}
        if stage.model_loss:
            found["weights"] = given_weights(trainer, view, type(self.config).__name__)[1]
        found |= {f"auxiliary losses ({name})": loss.detach() for name, loss in trainer.auxiliary_losses(view).items()}
        return found | {f"metrics ({name})": torch.as_tensor(value) for name, value in trainer.metrics().items()}

    # --- the whole optimizer step, in the real loop

    @_KINDS
    def test_micro_batches_change_nothing(self, packed: bool) -> None:
        """Loss and gradients do not depend on the split of a step."""
        step = random_step(6, packed=packed, rows=6)
        for stage in self.make_trainer().stages():
            whole = self._learn(step, stage, micro_batch_size=6)
            for size in (1, 4):
                part = self._learn(step, stage, micro_batch_size=size)
                _assert_same(part, whole, f"depends on the micro-batch size ({size} or 6)")

    @_KINDS
    def test_padding_changes_no_gradient(self, packed: bool) -> None:
        """More columns of padding leave loss and gradients as they are."""
        step = random_step(7, packed=packed)
        for stage in self.make_trainer().stages():
            left = self._learn(step, stage, micro_batch_size=4)
            right = self._learn(pad(step, columns=2, rows=0), stage, micro_batch_size=4)
            _assert_same(right, left, "depends on the amount of padding")

    @_KINDS
    def test_constant_weights_equal_the_baseline(self, packed: bool) -> None:
        """Constant weights train the model exactly as a plain trainer.

        There are no auxiliary losses here. Nothing reaches the trainer's modules: observing leaves the model alone, and
        modules learn by auxiliary losses only.
        """
        step = random_step(6, packed=packed)
        for stage in _weighted_stages(self.make_trainer()):
            trainer = self.make_trainer()
            # not by setattr: a trainer that is its own config class is frozen
            object.__setattr__(trainer, "token_weights", lambda view: torch.full(view.batch.input_ids.shape, 2.5))
            object.__setattr__(trainer, "auxiliary_losses", lambda view: {})
            ours = self._learn(step, stage, micro_batch_size=2, trainer=trainer)
            plain = self._learn(step, stage, micro_batch_size=2, trainer=Trainer())
            assert ours.keys() == plain.keys(), "the model loss reaches the trainer's modules"
            _assert_same(ours, plain, "is not what uniform weights give")

    def _weights(self, trainer: Trainer, step: Step, *, stage: str | None = None) -> tuple[Tensor, Tensor]:
        """Return placed weights and the valid mask, ``[B, S, H]`` both."""
        view = make_view(trainer, step, stage=stage or _weighted_stages(trainer)[0].name)
        targets: Targets = align_targets(step.batch, HORIZON)
        return given_weights(trainer, view, type(self.config).__name__)[1], targets.valid

    def _learn(self, step: Step, stage: Stage, *, micro_batch_size: int, trainer: Trainer | None = None) -> dict[str, Tensor]:
        """Compute the loss and all gradients of one step."""
        trainer = trainer or self.make_trainer()
        model = _model(seed=0, horizon=HORIZON)
        arguments: dict[str, Any] = {
            "model": model,
            "trainer": trainer,
            "trainer_name": type(self.config).__name__,
            "micro_batch_size": micro_batch_size,
            "normalizer": "sum_w",
            "device": torch.device("cpu"),
            "autocast": nullcontext,
            "seed": 0,
        }
        output = StepLoss(**arguments)(step.batch, 0, stage)
        found = {"loss": output.loss.detach()}
        parameters = [("model." + name, p) for name, p in model.named_parameters()]
        parameters += [
            (f"{name}.{inner}", p) for name, module in trainer.modules().items() for inner, p in module.named_parameters()
        ]
        found |= {name: p.grad for name, p in parameters if p.grad is not None}
        return found


def _model(seed: int, horizon: int) -> MTPModel:
    return copy.deepcopy(_made(seed, horizon))  # a fifth of the time that another takes to be made


@functools.cache
def _made(seed: int, horizon: int) -> MTPModel:
    return MTPModel(cast(PreTrainedModel, tiny_model(seed=seed)), HeadsConfig(horizon=horizon), seed=0)


def _assert_same(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], problem: str) -> None:
    """Compare loss and gradients, up to rounding.

    A gradient may be a sum of large terms that cancel.
    """
    assert ours.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(
            ours[name],
            tensor,
            rtol=1e-4,
            atol=1e-5 * float(tensor.abs().max()) + 1e-7 * largest,
            msg=lambda text, name=name: f"{name} {problem}: {text}",
        )


def _no_numbers(model: str, what: str) -> NoReturn:
    raise NotImplementedError("TrainerTests has random batches, of no data set whose tokens could have numbers")


def _weighted_stages(trainer: Trainer) -> list[Stage]:
    """List the stages that ask for weights."""
    return [stage for stage in trainer.stages() if stage.model_loss] or [Stage()]
