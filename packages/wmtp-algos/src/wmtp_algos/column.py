"""column: the weights come with the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from wmtp.errors import ConfigError
from wmtp.trainers import StepView, Trainer

if TYPE_CHECKING:
    from wmtp.data.dataset import TokenDataset

__all__ = ["ColumnTrainer"]

_NO_WEIGHTS = (
    "data.train: the trainer 'column' takes its weights from the data, but no document has any; use data with a weight for "
    "every token, or another trainer"
)


class ColumnTrainer(Trainer):
    """w[t, k] = the weight that the data gives to token x[t+k]."""

    def check_data(self, data: TokenDataset) -> Sequence[str]:
        """Some document must have weights."""
        return [] if data.has_weights else [_NO_WEIGHTS]

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S]``.

        Raises:
            ConfigError: no document of the training data has weights.
        """
        if view.batch.weight is None:
            raise ConfigError(_NO_WEIGHTS)
        return view.batch.weight
