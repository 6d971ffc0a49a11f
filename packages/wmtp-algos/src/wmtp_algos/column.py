"""column: the weights come with the data."""

from __future__ import annotations

from torch import Tensor

from wmtp.errors import ConfigError
from wmtp.training import StepView, Trainer

__all__ = ["ColumnTrainer"]


class ColumnTrainer(Trainer):
    """w[t, k] = the weight that the data gives to token x[t+k]."""

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; ``[B, S]``.

        Raises:
            ConfigError: no document of the training data has weights.
        """
        if view.batch.weight is None:
            raise ConfigError(
                "data.train: the trainer 'column' takes its weights from the data, but no document has any; use data with a "
                "weight for every token, or another trainer"
            )
        return view.batch.weight
