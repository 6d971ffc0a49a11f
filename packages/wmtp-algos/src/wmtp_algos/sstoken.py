"""sstoken: learn the tokens that the run has made progress on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, le

from wmtp import Trainer, TrainerConfig
from wmtp_algos.config import IS_DEVICE

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import HiddenView, StepView, TrainerSetup

__all__ = ["SSToken", "SSTokenTrainer"]


@frozen(kw_only=True)
class SSToken(TrainerConfig):
    """Self-modulated token selection (ssToken: Qin et al., arXiv 2510.18250).

    Learns the share of predictions with the highest retrospective excess:

        REL[t, k] = CE_hist[j] − CE_θ[t, k]        of token j = t+k; CE_hist: of the start model's next-token prediction

    High where the model has got better on a token since the start: what it can learn. No reference model of its own is needed:
    the history model is ``[models.base]`` as it was. The score is

        γ · norm(REL[t, k]) + (1 − γ) · a[j]     norm: to 0 … 1 within the scope

    with a[j] the share of token j's attention, a mean over the heads of the last layer, that goes to the tokens of its
    document which are not learned: its prompt. The authors' code takes a from the model as it is, γ = 0.5 and ``scope =
    "sequence"``; here a is the start model's, whose forward pass is made anyway. With γ = 1 it is not needed, and the norm
    changes no order. A moving average of the run as history model, which the paper mentions and the authors' code does not
    have, is not built.
    Costs the start model's memory and forward pass, unless ``reference_cache`` keeps what it gives.

    Args:
        keep: ρ, the share of predictions that is learned.
        gamma: γ, from 0, attention alone, to 1, REL alone.
        scope: what scores compete within: the whole ``batch`` of an optimizer step, each ``sequence`` (a document), or each
            ``head``. New heads are worse than the start model, and would lose in a batch.
        reference_precision: of the start model's parameters and products; ``bf16`` needs half the memory.
        reference_device: where the start model computes: ``cpu``, ``cuda``, ``cuda:1`` … Default: where the trained model does.
        reference_cache: keep CE_hist and a of every token beside the tokenized data (4 bytes each), for later epochs and runs.
    """

    type = "sstoken"
    required_models = ("base",)
    keep: float = field(default=0.6, validator=[gt(0.0), le(1.0)])
    gamma: float = field(default=1.0, validator=[ge(0.0), le(1.0)])
    scope: Literal["batch", "sequence", "head"] = "head"
    reference_precision: Literal["fp32", "bf16"] = "fp32"
    reference_device: str | None = field(default=None, validator=IS_DEVICE)
    reference_cache: bool = False

    def build(self) -> Trainer:
        """Make the trainer."""
        return SSTokenTrainer(self)


class SSTokenTrainer(Trainer):
    """Trainer that selects the best share ``keep`` of each scope.

    w = 1 where the score of `SSToken` is among the best of its scope, else 0.

    Args:
        config: see `SSToken`.
    """

    needs_token_loss = True

    def __init__(self, config: SSToken) -> None:
        self._config = config
        self._metrics: dict[str, Tensor] = {}

    def setup(self, setup: TrainerSetup) -> None:
        """Open what the start model gave, or load it.

        Raises:
            ConfigError: its attention cannot be watched.
        """
        from wmtp.errors import ConfigError
        from wmtp.models.attention_shares import watch_attention
        from wmtp_algos.reference import open_reference

        config = self._config
        kinds = {"start_loss": f"next-token loss {config.reference_precision}"}
        if config.gamma < 1.0:
            kinds["attention"] = f"attention to the prompt {config.reference_precision}"
        self._known = (
            {name: setup.token_numbers("base", kind) for name, kind in kinds.items()} if config.reference_cache else {}
        )
        self._names = tuple(kinds)
        if not self._known or not all(known.complete for known in self._known.values()):
            self._start = open_reference(config, setup, "base")
            if config.gamma < 1.0 and not watch_attention(self._start):
                raise ConfigError(
                    f"sstoken: gamma: {config.gamma} takes part of the score from the model's attention, and this "
                    "architecture's cannot be watched (it has windows, or is not torch's scaled dot product); write gamma = 1"
                )

    def observe(self, view: HiddenView) -> Mapping[str, Tensor]:
        """Observe ``start_loss``, CE_hist of each token, and ``attention``: ``[b, S]`` each.

        ``attention`` is a of `SSToken`, and there with γ < 1 only.
        """
        numbers: dict[str, Tensor] = {}

        def computed(name: str) -> Callable[[], Tensor]:
            def compute() -> Tensor:
                if not numbers:  # one forward pass gives both
                    numbers.update(self._compute(view))
                return numbers[name]

            return compute

        return {
            name: self._known[name].get(view.batch, computed(name)) if self._known else computed(name)() for name in self._names
        }

    def _compute(self, view: HiddenView) -> dict[str, Tensor]:
        from wmtp.data.batch import PADDING
        from wmtp.models.attention_shares import watching
        from wmtp_algos.reference import next_token_losses

        batch = view.batch
        if self._config.gamma == 1.0:
            return {"start_loss": next_token_losses(self._start, batch, view.packed)}
        device = next(self._start.parameters()).device
        prompt = (batch.document != PADDING) & ~batch.loss_mask
        with watching(self._start, prompt.to(device)) as shares:
            losses = next_token_losses(self._start, batch, view.packed)
        assert shares.found is not None, "a pass fills it"
        return {"start_loss": losses, "attention": shares.found.to(losses.device)}

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        import torch

        from wmtp_algos.selection import Groups

        valid, gamma = view.targets.valid, self._config.gamma
        progress = view.by_prediction(view.observations["start_loss"]) - view.token_loss
        self._metrics = {"sstoken/progress": torch.where(valid, progress, 0.0).sum() / valid.sum()}
        groups, scores = Groups.of(self._config.scope, view), progress
        if gamma < 1.0:
            scores = gamma * groups.scaled(progress) + (1.0 - gamma) * view.by_prediction(view.observations["attention"])
        weights = groups.top(scores, self._config.keep).float()
        # a score that is no number has no rank: let the loop say so
        return torch.where(progress.isfinite(), weights, torch.nan)

    def metrics(self) -> Mapping[str, Tensor]:
        """``sstoken/progress``: the mean of REL over the valid predictions."""
        return self._metrics
