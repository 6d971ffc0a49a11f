"""Config class of critic-wmtp. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, le, lt, optional

from wmtp.plugins.components import idle_keys
from wmtp.plugins.contract import TrainerConfig

if TYPE_CHECKING:
    from wmtp.trainers import Trainer

__all__ = ["CriticWMTP"]


@frozen(kw_only=True)
class CriticWMTP(TrainerConfig):
    """Advantage weights from a learned critic: two stages in one run.

    Learns most where the critic saw the text become better. Stage ``value`` freezes the model and learns V, how good the text
    so far is, from the rewards of whole documents. Stage ``train`` learns the documents with weights by advantage: with V_t the
    value after token t, r = R at a document's last token and 0 before, and V := 0 after its end

        δ_t = r_t + γ V_t − V_{t−1}      A_t = δ_t + γλ A_{t+1}      w_t = clip(exp(z_t / β), w_min, w_max), then mean 1

    with z the whitened A (GAE: arXiv 1506.02438; exponential weights: AWR, arXiv 1910.00177). A token's weight counts at every
    head that predicts it. Only tokens to learn have values to fit, advantages and weights: no prompt, no padding.

    It is an experiment. In reinforcement learning, advantage-weighted multi-token prediction with a fixed scale has lost to
    leaving the trunk alone (OCC, arXiv 2605.28184: 57.4 against 58.9). Compare it with ``shuffled``, and with a baseline on
    the correct documents alone.

    Args:
        reward: R of a document. ``verifiable``: the data's ``reward``, else 1 or 0 by its ``is_correct``; ``model``: the score
            of the reward model ``[models.rm]``, whitened over the training data and kept beside it.
        reward_template: what the reward model reads; ``{prompt}`` and ``{completion}`` are put in.
        reward_precision: of the reward model.
        reward_batch_size: documents that the reward model scores at once.
        critic: what V is computed from. ``trunk``: the hidden states that feed the heads, detached, so the value's loss never
            reaches the model; ``model``: a model of its own, ``[models.critic]``, all of which learns in stage ``value``. It
            needs the base model's vocabulary.
        value_loss: ``lambda-return``: squared distance of V to the λ-return of the reward; ``pairwise``: −log σ(mean V of a
            correct document − mean V of an incorrect one), over pairs of answers to one problem (the data's ``group``), of
            about equal length. Pairs are put into the same step; documents without a partner are left out of the stage. It
            teaches V no scale, so in advantages the value after the last token stands for R.
        pair_length_ratio: pairwise: the longer of a pair is at most this many times as long as the other.
        value_steps: optimizer steps of stage ``value``, at most.
        value_patience: ends the stage after this many steps without improvement of its mean loss. Default: never.
        value_min_delta: what counts as better.
        value_lr: the value head's peak learning rate. A critic model learns with ``optimizer.lr``.
        value_width: width of the value head's hidden layer.
        value_learns: whether the value head (and a critic model) keeps learning in stage ``train``. Then documents that are
            not learned are still read, to learn V from them.
        value_loss_coef: the factor of the value's loss in stage ``train``.
        value_head: a run, or its ``model`` folder, whose value head (and critic model) is taken instead of stage ``value``;
            the keys of that stage may stay in a recipe.
        gamma: γ.
        gae_lambda: λ, of advantages and λ-returns.
        delta: ``gae``: advantages as above; ``td``: δ alone.
        whitening: by mean and variance over the tokens that are learned: ``ema``: running means over the steps, kept in
            checkpoints; ``batch``: those of the step.
        ema_decay: of the running means.
        beta: β; the higher, the flatter the weights.
        min_weight: w_min.
        max_weight: w_max.
        train_on: ``correct``: stage ``train`` learns correct documents only; ``all``: all of them.
        correct_reward: a document without ``is_correct`` is correct if its ``reward`` is at least this.
    """

    type = "critic-wmtp"
    tells_right_from_wrong = True
    uri_keys = ("value_head",)
    reward: Literal["verifiable", "model"] = "verifiable"
    reward_template: str = "{prompt}{completion}"
    reward_precision: Literal["fp32", "bf16"] = "fp32"
    reward_batch_size: int = field(default=8, validator=ge(1))
    critic: Literal["trunk", "model"] = "trunk"
    value_loss: Literal["lambda-return", "pairwise"] = "lambda-return"
    pair_length_ratio: float = field(default=1.5, validator=ge(1.0))
    value_steps: int = field(default=500, validator=ge(1))
    value_patience: int | None = field(default=None, validator=optional(ge(1)))
    value_min_delta: float = field(default=0.0, validator=ge(0.0))
    value_lr: float = field(default=1e-3, validator=[gt(0.0), lt(float("inf"))])
    value_width: int = field(default=256, validator=ge(1))
    value_learns: bool = False
    value_loss_coef: float = field(default=1.0, validator=[gt(0.0), lt(float("inf"))])
    value_head: str | None = None
    gamma: float = field(default=1.0, validator=[gt(0.0), le(1.0)])
    gae_lambda: float = field(default=0.95, validator=[ge(0.0), le(1.0)])
    delta: Literal["gae", "td"] = "gae"
    whitening: Literal["ema", "batch"] = "ema"
    ema_decay: float = field(default=0.99, validator=[ge(0.0), lt(1.0)])
    beta: float = field(default=1.0, validator=[gt(0.0), lt(float("inf"))])
    min_weight: float = field(default=0.1, validator=[ge(0.0), lt(float("inf"))])
    max_weight: float = field(default=3.0, validator=[gt(0.0), lt(float("inf"))])
    train_on: Literal["correct", "all"] = "correct"
    correct_reward: float = 0.5

    @property
    def required_models(self) -> tuple[str, ...]:  # type: ignore[override]
        """``critic`` where the critic is a model of its own."""
        return ("critic",) if self.critic == "model" else ()

    @property
    def reward_models(self) -> tuple[str, ...]:  # type: ignore[override]
        """``rm`` where the reward comes from a model."""
        return ("rm",) if self.reward == "model" else ()

    def check(self) -> Iterator[str]:
        """Report contradictions between keys."""
        if self.min_weight > self.max_weight:
            yield f"min_weight: {self.min_weight} must be at most max_weight = {self.max_weight}"
        if "{completion}" not in self.reward_template:
            yield "reward_template: must hold {completion}, else every answer to a prompt gets the same score"
        if self.reward != "model":
            keys = ("reward_template", "reward_precision", "reward_batch_size")
            yield from idle_keys(self, keys, f'reward = "{self.reward}" asks no reward model')
        if self.value_loss != "pairwise":
            yield from idle_keys(self, ("pair_length_ratio",), f'value_loss = "{self.value_loss}" makes no pairs')
        elif self.delta == "td":
            yield from idle_keys(self, ("gae_lambda",), 'value_loss = "pairwise" and delta = "td" use no λ')
        if self.value_patience is None:
            yield from idle_keys(self, ("value_min_delta",), "without value_patience the stage never ends early")
        if not self.value_learns:
            yield from idle_keys(
                self, ("value_loss_coef",), "value_learns = false ends the value's learning with stage 'value'"
            )
        if self.whitening == "batch":
            yield from idle_keys(self, ("ema_decay",), 'whitening = "batch" keeps no running means')

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.critic_wmtp import CriticWMTPTrainer

        return CriticWMTPTrainer(self)
