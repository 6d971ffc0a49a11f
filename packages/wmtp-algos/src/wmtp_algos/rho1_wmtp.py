"""rho1-wmtp: the excess loss against a reference model decides what is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wmtp.trainers import HiddenView, StepView, Trainer, TrainerSetup
from wmtp_algos.reference import next_token_losses, open_reference
from wmtp_algos.selection import Groups

if TYPE_CHECKING:
    from wmtp_algos.config import Rho1WMTP

__all__ = ["Rho1WMTPTrainer"]

_KNOWN = "next-token loss"


class Rho1WMTPTrainer(Trainer):
    """Selective multi-token prediction by excess loss, at every head.

    After Rho-1 (Lin et al., arXiv 2404.07965, eq. 3 and 4). With the score s of each valid prediction, Δ[t, k] = CE[t, k] −
    CE_ref[t+k] or what ``score`` says:

        token-skip   w = 1 where s is among the best share ``keep`` of its scope, else 0
        weighted     w = min(max_weight, n · softmax(s / T)) / mean        over the n valid predictions of its scope

    T is ``temperature``, or higher where the effective sample would be under ``min_ess_share`` (`Groups.tempered`).

    Args:
        config: see `wmtp_algos.config.Rho1WMTP`.
    """

    def __init__(self, config: Rho1WMTP) -> None:
        self._config = config
        self._metrics: dict[str, Tensor] = {}

    @property
    def needs_token_loss(self) -> bool:  # type: ignore[override]
        """For all scores but that of the reference alone."""
        return self._config.score != "reference"

    def setup(self, setup: TrainerSetup) -> None:
        """See `Trainer.setup`."""
        config = self._config
        self._known = setup.token_numbers("ref", f"{_KNOWN} {config.reference_precision}") if config.reference_cache else None
        if self._known is None or not self._known.complete:
            self._reference = open_reference(config, setup, "ref")

    def observe(self, view: HiddenView) -> Mapping[str, Tensor]:
        """``reference_loss``: CE_ref of each token, ``[b, S]``."""

        def compute() -> Tensor:
            return next_token_losses(self._reference, view.batch, view.packed)

        return {"reference_loss": compute() if self._known is None else self._known.get(view.batch, compute)}

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        config = self._config
        reference = view.by_prediction(view.observations["reference_loss"])
        scores = view.token_loss - reference if self.needs_token_loss else -reference
        self._metrics = {"rho1/reference_loss": _mean(view, reference)}
        if self.needs_token_loss:
            self._metrics["rho1/excess"] = _mean(view, scores)
        if config.score == "absolute":
            scores = scores.abs()
        groups = Groups.of(config.scope, view)
        if config.mode == "token-skip":
            weights = groups.top(scores, config.keep).float()
        else:
            if config.score != "reference":
                scores = torch.where(scores.abs() < config.min_excess, 0.0, scores)
            weights, temperature = groups.tempered(
                scores, config.temperature, max_weight=config.max_weight, min_share=config.min_ess_share
            )
            weights = groups.mean_one(weights)
            self._metrics["rho1/temperature"] = temperature.max()
        # a score that is no number has no rank: let the loop say so
        return torch.where(scores.isfinite(), weights, torch.nan)

    def metrics(self) -> Mapping[str, Tensor]:
        """``rho1/reference_loss`` and ``rho1/excess``, means over the valid predictions; ``rho1/temperature``, the highest."""
        return self._metrics


def _mean(view: StepView, values: Tensor) -> Tensor:
    """Average over the valid predictions."""
    valid = view.targets.valid
    return torch.where(valid, values, 0.0).sum() / valid.sum()
