"""sstoken: learn the tokens that the run has made progress on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen
from attrs.validators import gt, le, matches_re, optional

from wmtp import Trainer, TrainerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import HiddenView, StepView, TrainerSetup

__all__ = ["SSToken", "SSTokenTrainer"]


@frozen(kw_only=True)
class SSToken(TrainerConfig):
    """Self-modulated token selection (ssToken: Qin et al., arXiv 2510.18250): the share with the highest retrospective excess.

        REL[t, k] = CE_hist[j] − CE_θ[t, k]        of token j = t+k; CE_hist: of the start model's next-token prediction

    High where the model has got better on a token since the start: what it can learn. No reference model of its own is needed:
    the history model is ``[models.base]`` as it was. The paper scores γ · norm(REL) + (1 − γ) · attention; attention is not
    built here, so γ = 1, with which the norm changes no order. Nor is its other history model, a moving average of the run.
    Costs the start model's memory and forward pass, unless ``reference_cache`` keeps what it gives.

    Args:
        keep: ρ, the share of predictions that is learned.
        gamma: γ; only 1.
        scope: what scores compete within: the whole ``batch`` of an optimizer step, each ``sequence`` (a document), or each
            ``head``. New heads are worse than the start model, and would lose in a batch.
        reference_precision: of the start model's parameters and products; ``bf16`` needs half the memory.
        reference_device: where the start model computes: ``cpu``, ``cuda``, ``cuda:1`` … Default: where the trained model does.
        reference_cache: keep CE_hist of every token beside the tokenised data (4 bytes a token), for later epochs and runs.
    """

    type = "sstoken"
    required_models = ("base",)
    keep: float = field(default=0.6, validator=[gt(0.0), le(1.0)])
    gamma: float = field(default=1.0)
    scope: Literal["batch", "sequence", "head"] = "head"
    reference_precision: Literal["fp32", "bf16"] = "fp32"
    reference_device: str | None = field(default=None, validator=optional(matches_re(r"cpu|mps|cuda(:\d+)?")))
    reference_cache: bool = False

    def check(self) -> Iterator[str]:
        """Refuse the half of the score that is not built."""
        if self.gamma != 1.0:
            yield f"gamma: {self.gamma}, and only 1 is built: importance by attention is not; write 1, or remove it"

    def build(self) -> Trainer:
        """Make the trainer."""
        return SSTokenTrainer(self)


class SSTokenTrainer(Trainer):
    """w = 1 where REL is among the best share ``keep`` of its scope, else 0.

    Args:
        config: see `SSToken`.
    """

    needs_token_loss = True

    def __init__(self, config: SSToken) -> None:
        self._config = config
        self._metrics: dict[str, Tensor] = {}

    def setup(self, setup: TrainerSetup) -> None:
        """Open what the start model gave, or load it."""
        from wmtp_algos.reference import open_reference

        config = self._config
        kind = f"next-token loss {config.reference_precision}"
        self._known = setup.token_numbers("base", kind) if config.reference_cache else None
        if self._known is None or not self._known.complete:
            self._start = open_reference(config, setup, "base")

    def observe(self, view: HiddenView) -> Mapping[str, Tensor]:
        """``start_loss``: CE_hist of each token, ``[b, S]``."""
        from wmtp_algos.reference import next_token_losses

        def compute() -> Tensor:
            return next_token_losses(self._start, view.batch, view.packed)

        return {"start_loss": compute() if self._known is None else self._known.get(view.batch, compute)}

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        import torch

        from wmtp_algos.selection import Groups

        valid = view.targets.valid
        scores = view.by_prediction(view.observations["start_loss"]) - view.token_loss
        self._metrics = {"sstoken/progress": torch.where(valid, scores, 0.0).sum() / valid.sum()}
        weights = Groups.of(self._config.scope, view).top(scores, self._config.keep).float()
        # a score that is no number has no rank: let the loop say so
        return torch.where(scores.isfinite(), weights, torch.nan)

    def metrics(self) -> Mapping[str, Tensor]:
        """``sstoken/progress``: the mean of REL over the valid predictions."""
        return self._metrics
