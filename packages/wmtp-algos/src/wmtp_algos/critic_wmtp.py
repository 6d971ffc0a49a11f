"""critic-wmtp: a critic's advantages decide how much each token is learned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wmtp.config.schema import EarlyStoppingConfig
from wmtp.data.batch import PADDING
from wmtp.errors import ConfigError
from wmtp.trainers import HiddenView, Stage, StepView, Trainer, TrainerSetup
from wmtp.trainers.modules import load_module
from wmtp_algos import advantage as maths
from wmtp_algos.critic_data import check_rewards, correct_documents, is_correct, reward_of
from wmtp_algos.pairs import pair_documents, pairs_of_step, pairwise_accuracy, pairwise_loss
from wmtp_algos.running_mean import RunningMean
from wmtp_algos.value_head import ValueHead

if TYPE_CHECKING:
    from wmtp.data.batch import Batch, Document
    from wmtp.data.dataset import TokenDataset
    from wmtp_algos.critic_config import CriticWMTP

__all__ = ["CriticWMTPTrainer"]

_log = logging.getLogger("wmtp")
_VALUE, _TRAIN = "value", "train"
_LOSS_DECAY = 0.9


class CriticWMTPTrainer(Trainer):
    """Advantage-weighted multi-token prediction, in two stages; the formulas are in `wmtp_algos.advantage`.

        value    fit V to the rewards, with the model frozen
        train    w[t, k] = the weight of token t+k by its advantage; the value head is frozen, or keeps learning

    Args:
        config: see `wmtp_algos.critic_config.CriticWMTP`.
    """

    def __init__(self, config: CriticWMTP) -> None:
        self._config = config
        self._metrics: dict[str, Tensor] = {}

    # --- before the first step

    def check_data(self, data: TokenDataset) -> Sequence[str]:
        """See `Trainer.check_data`: rewards, both classes, pairs."""
        return check_rewards(self._config, data)

    def stages(self) -> Sequence[Stage]:
        """``value``, unless a value head is given, and ``train``."""
        config, modules = self._config, self._module_names
        until = None
        if config.value_patience is not None:
            until = EarlyStoppingConfig(
                metric="critic/value_loss_mean", patience=config.value_patience, min_delta=config.value_min_delta
            )
        value = Stage(
            name=_VALUE, steps=config.value_steps, frozen=frozenset({"model", "heads"}), model_loss=False, until=until
        )
        train = Stage(name=_TRAIN, frozen=frozenset() if config.value_learns else frozenset(modules))
        return (train,) if config.value_head is not None else (value, train)

    def groups(self, data: TokenDataset, stage: Stage) -> NDArray[np.int64] | None:
        """See `Trainer.groups`.

        Stage ``value``: all documents, or pairs of them; stage ``train``: those to learn, and where the value learns too, the
        rest.
        """
        config, numbers = self._config, np.arange(len(data))
        learns_value = stage.name == _VALUE or (stage.name == _TRAIN and config.value_learns)
        if learns_value and config.value_loss == "pairwise":
            correct = correct_documents(config, data)
            pair = pair_documents(data.groups, correct, data.learned_lengths, config.pair_length_ratio)
            if stage.name == _VALUE:
                return pair
            return np.where(pair >= 0, pair, numbers)
        if learns_value or config.train_on == "all":
            return None
        correct = correct_documents(config, data)
        return None if correct.all() else np.where(correct, numbers, -1)

    def setup(self, setup: TrainerSetup) -> None:
        """See `Trainer.setup`."""
        config = self._config
        self._device = setup.device
        self._critic = None
        hidden_size = setup.hidden_size
        if config.critic == "model":
            self._critic = setup.model("critic")
            hidden_size = self._critic.hidden_size
        self._value_head = ValueHead(hidden_size, config.value_width, setup.seed)
        if config.value_head is not None:
            learned = setup.fetch(config.value_head, "trainer.value_head")
            _log.info("the value head is that of %s: stage 'value' and the keys that only it reads are left out", learned)
            for name, module in self.modules().items():
                load_module(module, name, learned)
        if config.reward == "model":
            self._scores = self._score(setup)
        self._moments = RunningMean(config.ema_decay if config.whitening == "ema" else 0.0, 2, setup.device)
        self._value_loss = RunningMean(_LOSS_DECAY, 1, setup.device)

    def _score(self, setup: TrainerSetup) -> Callable[[Document], float]:
        """Return the reward model's scores, whitened over all documents."""
        config = self._config
        numbers = setup.reward_scores(
            "rm",
            template=config.reward_template,
            dtype=torch.bfloat16 if config.reward_precision == "bf16" else torch.float32,
            batch_size=config.reward_batch_size,
        )
        scores = numbers.values.astype(np.float64)
        mean, std = float(scores.mean()), float(scores.std())
        if scores.min() == scores.max():
            raise ConfigError(
                f"models.rm: gives all {len(scores):,} documents the same score, {mean:g}, so there is no value to learn; use "
                "another reward model, or trainer.reward = 'verifiable'"
            )
        return lambda document: (numbers.of(document) - mean) / std

    @property
    def _module_names(self) -> tuple[str, ...]:
        return ("value_head", "critic") if self._config.critic == "model" else ("value_head",)

    def modules(self) -> Mapping[str, nn.Module]:
        """``value_head``, and ``critic`` where it is a model of its own."""
        return {"value_head": self._value_head} | ({} if self._critic is None else {"critic": self._critic})

    def learning_rates(self) -> Mapping[str, float]:
        """See `Trainer.learning_rates`."""
        return {"value_head": self._config.value_lr}

    # --- every step

    def observe(self, view: HiddenView) -> Mapping[str, Tensor]:
        """Observe ``value``: V after each token, ``[b, S]`` fp32.

        Nothing in the heads' warm-up, when V knows nothing yet.
        """
        if view.stage not in (_VALUE, _TRAIN):
            return {}
        if self._critic is None:
            hidden = view.trunk.detach()
        else:
            hidden = self._critic(view.batch.input_ids, view.batch.position, view.packed).hidden[0]
        return {"value": self._value_head(hidden)}

    def auxiliary_losses(self, view: StepView) -> Mapping[str, Tensor]:
        """Return ``value``, where the value learns.

        Computes the diagnostics too, in both stages.
        """
        if "value" not in view.observations:
            return {}
        config, batch = self._config, view.batch
        value, reward = view.observations["value"], self._rewards(batch)
        states = _states(batch)
        of_document = maths.document_means(value, batch.loss_mask, batch.document, len(batch.documents))
        pairs = self._pairs(batch)
        if config.value_loss == "pairwise":
            loss, known = pairwise_loss(of_document, pairs), pairs.any()
        else:
            target = maths.lambda_returns(value.detach(), reward, batch.document, gamma=config.gamma, lam=config.gae_lambda)
            errors = torch.where(states, value - target, 0.0)
            loss, known = errors.square().sum() / states.sum().clamp(min=1), states.any()
        if view.stage == _VALUE:
            self._metrics = {}
        self._metrics |= self._diagnostics(view, value.detach(), reward, states)  # to those of `token_weights`, asked before
        self._metrics["critic/value_loss"] = torch.where(known, loss.detach(), torch.nan)
        self._metrics["critic/value_loss_mean"] = self._value_loss.update(loss.detach().reshape(1), known)[0]
        self._metrics["critic/pairwise_accuracy"] = pairwise_accuracy(of_document.detach(), pairs)
        if view.stage == _VALUE:
            return {"value": loss}
        return {"value": config.value_loss_coef * loss} if config.value_learns else {}

    def eligible(self, view: StepView) -> Tensor:
        """See `Trainer.eligible`: predictions of tokens in learned documents, ``[B, S, H]``."""
        return view.by_prediction(self._learned(view.batch)) & view.targets.valid

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S]``."""
        config = self._config
        learned = self._learned(view.batch)
        if view.stage != _TRAIN:
            return learned.float()  # the heads' warm-up, when V knows nothing yet
        advantage = self._advantages(view)
        count, mean, variance = maths.masked_moments(advantage, learned & (view.batch.position > 0))
        mean, square = self._moments.update(torch.stack([mean, variance + mean.square()]), count > 0)
        std = (square - mean.square()).clamp(min=0).sqrt()
        weights = maths.advantage_weights(
            advantage, mean=mean, std=std, beta=config.beta, min_weight=config.min_weight, max_weight=config.max_weight
        )
        _, average, _ = maths.masked_moments(view.by_prediction(weights), self.eligible(view))
        self._metrics = {"critic/advantage_mean": mean, "critic/advantage_std": std}
        return torch.where(learned, weights / average.to(weights.dtype), 0.0)

    def token_details(self, view: StepView) -> Mapping[str, Tensor]:
        """``value`` and ``advantage`` of each token to learn."""
        if "value" not in view.observations:
            return {}
        known = view.batch.loss_mask & (view.batch.position > 0)
        details = {"value": view.observations["value"].detach(), "advantage": self._advantages(view)}
        return {name: torch.where(known, number, torch.nan) for name, number in details.items()}

    # --- what both need

    def _advantages(self, view: StepView) -> Tensor:
        """A of each token, ``[B, S]`` fp32.

        Pairs teach only differences of V, so its zero and its scale are not those of the reward. Then the value after the last
        token stands for the reward.
        """
        config, value = self._config, view.observations["value"].detach()
        reward = value if config.value_loss == "pairwise" else self._rewards(view.batch)
        return maths.advantages(
            value, reward, view.batch.document, gamma=config.gamma, lam=config.gae_lambda, delta=config.delta
        )

    def _rewards(self, batch: Batch) -> Tensor:
        """At each token the reward of its document, ``[B, S]``."""
        return maths.by_token(
            self._of_documents(batch, [self._reward(document) for document in batch.documents]), batch.document
        )

    def _reward(self, document: Document) -> float:
        return reward_of(document) if self._config.reward == "verifiable" else self._scores(document)

    def _learned(self, batch: Batch) -> Tensor:
        """Mark the tokens that stage ``train`` learns, ``[B, S]`` bool."""
        if self._config.train_on == "all":
            return batch.loss_mask
        correct = [float(is_correct(self._config, document)) for document in batch.documents]
        return batch.loss_mask & (maths.by_token(self._of_documents(batch, correct), batch.document) > 0)

    def _pairs(self, batch: Batch) -> Tensor:
        """``[N, N]``, see `pairs_of_step`; none where some document has no label."""
        numbers = {key: float(number) for number, key in enumerate({(d.source, d.group): None for d in batch.documents})}
        group = self._of_documents(batch, [numbers[d.source, d.group] for d in batch.documents])
        labelled = all(d.is_correct is not None or d.reward is not None for d in batch.documents)
        correct = [float(labelled and is_correct(self._config, d)) for d in batch.documents]
        place = torch.where(batch.loss_mask, batch.document, len(batch.documents)).flatten()
        length = torch.zeros(len(batch.documents) + 1, device=place.device).index_add(0, place, torch.ones_like(place).float())
        right = self._of_documents(batch, correct) > 0
        return pairs_of_step(group, right, length[:-1], self._config.pair_length_ratio)

    def _of_documents(self, batch: Batch, numbers: Sequence[float]) -> Tensor:
        """Numbers of the documents on the batch's device, without waiting for it."""
        on_host = torch.tensor(numbers, dtype=torch.float32)
        device = batch.input_ids.device
        return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host.to(device)

    def _diagnostics(self, view: StepView, value: Tensor, reward: Tensor, states: Tensor) -> dict[str, Tensor]:
        """Compute the metrics that show whether V is learning: see docs/algorithms.md."""
        batch = view.batch
        returns = maths.monte_carlo_returns(reward, batch.document, gamma=self._config.gamma)
        _, _, unexplained = maths.masked_moments(returns - value, states)
        _, _, variance = maths.masked_moments(returns, states)
        count = len(batch.documents)
        mean = maths.document_means(value, states, batch.document, count)
        spread = maths.document_means((value - maths.by_token(mean, batch.document)).square(), states, batch.document, count)
        seen = maths.document_means(states.float(), states, batch.document, count)  # 1, or 0 for a document without any state
        comparable = self._config.value_loss == "lambda-return"  # pairs teach no scale
        return {
            "critic/explained_variance": 1 - unexplained / variance if comparable else torch.full_like(variance, torch.nan),
            "critic/value_std_within": (spread.sqrt().sum() / seen.sum()),
            "critic/value_position_correlation": maths.correlation(value, batch.position.to(value.dtype), states),
        }

    def metrics(self) -> Mapping[str, Tensor]:
        """Return the metrics ``critic/…``.

        Those that compare two kinds of document are missing where a step has only one.
        """
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the running means."""
        return {"moments": self._moments.state_dict(), "value_loss": self._value_loss.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Trainer.load_state_dict`."""
        self._moments.load_state_dict(state["moments"])
        self._value_loss.load_state_dict(state["value_loss"])


def _states(batch: Batch) -> Tensor:
    """Mark the states whose V counts, ``[B, S]`` bool.

    After each token to learn, and before the first, whose advantage is taken against it.
    """
    before = torch.zeros_like(batch.loss_mask)
    before[:, :-1] = batch.loss_mask[:, 1:] & (batch.document[:, 1:] == batch.document[:, :-1])
    return (batch.loss_mask | before) & (batch.document != PADDING)
