"""Our own algorithms pass the suite that plugins inherit."""

import attrs
import pytest
import torch

from wmtp.plugins.components import Component, component
from wmtp.plugins.contract import TrainerConfig
from wmtp.testing import TrainerTests
from wmtp.trainers import Stage, Trainer
from wmtp_algos import (
    ASFT,
    DFT,
    EAFT,
    AdaMTP,
    BaselineMTP,
    Column,
    CriticWMTP,
    Distill,
    EntropyTop,
    Focal,
    HorizonDecay,
    RandomMatched,
    Rho1WMTP,
    Shuffled,
    SSToken,
)


class TestBaselineMTP(TrainerTests):
    config = BaselineMTP()


class TestRho1Weighted(TrainerTests):
    config = Rho1WMTP(mode="weighted")


class TestRho1TokenSkip(TrainerTests):
    config = Rho1WMTP(mode="token-skip", keep=0.3, scope="sequence", score="absolute")


@pytest.mark.slow
class TestRho1ByReference(TrainerTests):
    config = Rho1WMTP(mode="token-skip", scope="head", score="reference", reference_precision="bf16", reference_device="cpu")


class TestDFT(TrainerTests):
    config = DFT()


class TestASFT(TrainerTests):
    config = ASFT()


class TestDistill(TrainerTests):
    config = Distill(kl_weight=2.0)


class TestSSToken(TrainerTests):
    config = SSToken(keep=0.4, gamma=0.5, scope="sequence", reference_precision="bf16", reference_device="cpu")


class TestFocal(TrainerTests):
    config = Focal(gamma=0.5)


class TestHorizonDecay(TrainerTests):
    config = HorizonDecay()


class TestColumn(TrainerTests):
    config = Column()


class TestEAFT(TrainerTests):
    config = EAFT()


class TestEntropyTop(TrainerTests):
    config = EntropyTop(scope="head")


class TestCritic(TrainerTests):
    config = CriticWMTP()


class TestCriticThatLearnsByPairs(TrainerTests):
    config = CriticWMTP(
        critic="model", value_loss="pairwise", value_learns=True, delta="td", whitening="batch", pair_length_ratio=20.0
    )


@pytest.mark.slow
class TestCriticOnAll(TrainerTests):
    config = CriticWMTP(train_on="all", value_learns=True, gamma=0.97, gae_lambda=0.5, ema_decay=0.5)


@pytest.mark.slow
class TestShuffledCritic(TrainerTests):
    config = Shuffled(of=CriticWMTP(value_learns=True))


@pytest.mark.slow
class TestRandomMatchedCritic(TrainerTests):
    config = RandomMatched(of=CriticWMTP(value_loss="pairwise"))


class TestAdaMTP(TrainerTests):
    config = AdaMTP()


@pytest.mark.slow
class TestShuffledRho1(TrainerTests):
    config = Shuffled(of=Rho1WMTP(mode="token-skip"))


@pytest.mark.slow
class TestRandomMatchedDFT(TrainerTests):
    config = RandomMatched(of=DFT())


class LearnedWeights(Trainer):
    """A third party's trainer with everything that a control must hand on."""

    needs_token_loss = True
    needs_entropy = True
    entropy_top_k = 3

    def setup(self, setup):
        self.value = torch.nn.Linear(setup.hidden_size, 1)
        self.mean = torch.zeros(())

    def modules(self):
        return {"value": self.value}

    def stages(self):
        return (Stage(name="value", steps=2, frozen=frozenset({"model", "heads"}), model_loss=False), Stage())

    def observe(self, view):
        return {"value": self.value(view.trunk.detach()).squeeze(-1)}

    def token_weights(self, view):
        valid = view.targets.valid
        self.mean = 0.5 * self.mean + 0.5 * (view.token_loss * valid).sum() / valid.sum().clamp(min=1)
        return view.by_prediction(view.observations["value"].exp()) * (view.entropy + view.token_loss + self.mean)

    def auxiliary_losses(self, view):
        return {"value": (view.observations["value"][view.batch.loss_mask] - 1).square().sum()}

    def metrics(self):
        return {"learned/mean": self.mean}

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


@attrs.frozen(kw_only=True)
class Learned(TrainerConfig):
    type = "learned"

    def build(self):
        return LearnedWeights()


@attrs.frozen(kw_only=True)
class Nested(TrainerConfig):
    """A control of a control: keeps the registered classes out of it, as `Learned` is in no plugin."""

    type = "nested"
    of: Component = component("trainers", default=Learned())

    def build(self):
        return Shuffled(of=RandomMatched(of=self.of)).build()


class TestControlsOfAThirdParty(TrainerTests):
    config = Nested()
    registered = False

    @pytest.mark.skip(reason="'learned' is in no plugin, so TOML cannot name it")
    def test_config_survives_toml(self):
        pass


class TestThirdPartyAlone(TrainerTests):
    config = Learned()
    registered = False
