"""loss-truncation: documents with a loss above a running quantile are not learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wmtp import StepView, Trainer

if TYPE_CHECKING:
    from wmtp_example.loss_truncation import LossTruncation

__all__ = ["LossTruncationTrainer"]


class LossTruncationTrainer(Trainer):
    """Loss truncation (Kang and Hashimoto, arXiv 2004.14589), at all heads.

        ℓ_d = mean of CE[t, k] over the valid predictions of document d        (the paper: of its next-token predictions)
        w   = 1 where ℓ_d ≤ q, else 0          q the (1 − drop) quantile of ℓ over the last ``window`` documents, this step's
                                               among them; the document with the lowest loss of a step is always learned

    Args:
        config: see `wmtp_example.loss_truncation.LossTruncation`.
    """

    needs_token_loss = True

    def __init__(self, config: LossTruncation) -> None:
        self._config = config
        self._last = torch.zeros(0)  # ℓ of the last documents
        self._metrics: dict[str, Tensor] = {}

    def token_weights(self, view: StepView) -> Tensor:
        """Return a weight for each token, ``[B, S]``.

        The view holds the whole step, whatever the micro-batches are.
        """
        number = view.batch.document.clamp(min=0)  # padding has no valid prediction
        count = torch.zeros(len(view.batch.documents), device=number.device)
        total = torch.zeros_like(count)
        count.index_add_(0, number.flatten(), view.targets.valid.sum(dim=-1).flatten().float())
        total.index_add_(0, number.flatten(), view.token_loss.sum(dim=-1).flatten().float())
        losses = (total / count)[count > 0]  # of the documents that learn anything
        self._last = torch.cat([self._last.to(losses.device), losses])[-self._config.window :]
        self._losses = total / count
        self._metrics = {}
        if len(losses) == 0 or view.step < self._config.warmup_steps:
            return view.uniform()
        threshold = torch.quantile(self._last, 1 - self._config.drop)
        learned = self._losses <= torch.maximum(threshold, losses.min())
        self._metrics = {"truncation/threshold": threshold, "truncation/dropped": 1 - learned[count > 0].float().mean()}
        return learned.float()[number]

    def token_details(self, view: StepView) -> Mapping[str, Tensor]:
        """``document_loss``: ℓ of the token's document, for ``wmtp report``."""
        return {"document_loss": self._losses[view.batch.document.clamp(min=0)]}

    def metrics(self) -> Mapping[str, Tensor]:
        """Metrics ``truncation/threshold`` (q) and ``truncation/dropped``.

        The latter is the share of the step's documents that is left out.
        """
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the losses of the last documents, from which a run resumes."""
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._last = state["last"]
