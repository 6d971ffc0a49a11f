"""Base of all controls: another trainer in everything but its weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wmtp.trainers import HiddenView, Stage, StepView, Trainer, TrainerSetup
from wmtp.trainers.checks import given_weights

if TYPE_CHECKING:
    from wmtp.data.dataset import TokenDataset

__all__ = ["ControlTrainer"]


class ControlTrainer(Trainer):
    """Another trainer, the treatment, with other weights of the same size.

    Modules, stages, documents, observations, auxiliary losses, details, metrics and state are the treatment's. Its weights
    are changed for each head alone, so that every head keeps its share of the loss.

    Args:
        treatment: any trainer.
        name: what messages call it.
    """

    def __init__(self, treatment: Trainer, name: str) -> None:
        self._treatment = treatment
        self._name = name

    @property
    def needs_token_loss(self) -> bool:  # type: ignore[override]
        """As the treatment."""
        return self._treatment.needs_token_loss

    @property
    def needs_entropy(self) -> bool:  # type: ignore[override]
        """As the treatment."""
        return self._treatment.needs_entropy

    @property
    def entropy_top_k(self) -> int | None:  # type: ignore[override]
        """As the treatment."""
        return self._treatment.entropy_top_k

    def setup(self, setup: TrainerSetup) -> None:
        """See `Trainer.setup`."""
        self._treatment.setup(setup)

    def modules(self) -> Mapping[str, nn.Module]:
        """See `Trainer.modules`."""
        return self._treatment.modules()

    def stages(self) -> Sequence[Stage]:
        """See `Trainer.stages`."""
        return self._treatment.stages()

    def check_data(self, data: TokenDataset) -> Sequence[str]:
        """See `Trainer.check_data`."""
        return self._treatment.check_data(data)

    def groups(self, data: TokenDataset, stage: Stage) -> NDArray[np.int64] | None:
        """See `Trainer.groups`."""
        return self._treatment.groups(data, stage)

    def learning_rates(self) -> Mapping[str, float]:
        """See `Trainer.learning_rates`."""
        return self._treatment.learning_rates()

    def observe(self, view: HiddenView) -> Mapping[str, Tensor]:
        """See `Trainer.observe`."""
        return self._treatment.observe(view)

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S, H]``."""
        _, weights = given_weights(self._treatment, view, self._name)
        chosen = self._treatment.eligible(view)
        places = view.targets.valid if chosen is None else view.targets.valid & chosen
        changed = torch.zeros_like(weights)
        for k in range(weights.shape[-1]):
            valid = places[..., k]
            treated = weights[..., k][valid]
            # weights that are not allowed are left for the loop to refuse
            allowed = (treated.isfinite() & (treated >= 0)).all()
            changed[..., k][valid] = torch.where(allowed, self.replace(treated, view.generator), treated)
        return changed

    def eligible(self, view: StepView) -> Tensor | None:
        """See `Trainer.eligible`."""
        return self._treatment.eligible(view)

    @abstractmethod
    def replace(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Other weights for one head.

        Args:
            weights: ``[n]``, the treatment's, of the head's predictions that it weighs, in the order of the data.
            generator: on the CPU, where all random numbers must come from.

        Returns:
            ``[n]``.
        """

    def auxiliary_losses(self, view: StepView) -> Mapping[str, Tensor]:
        """See `Trainer.auxiliary_losses`."""
        return self._treatment.auxiliary_losses(view)

    def token_details(self, view: StepView) -> Mapping[str, Tensor]:
        """See `Trainer.token_details`."""
        return self._treatment.token_details(view)

    def metrics(self) -> Mapping[str, Tensor | float]:
        """See `Trainer.metrics`."""
        return self._treatment.metrics()

    def state_dict(self) -> dict[str, Any]:
        """See `Trainer.state_dict`."""
        return self._treatment.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Trainer.load_state_dict`."""
        self._treatment.load_state_dict(state)
