"""column: the weights come with the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from wmtp import ConfigError, Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import StepView
    from wmtp.data.dataset import TokenDataset

__all__ = ["Column"]

_NO_WEIGHTS = (
    "data.train: the trainer 'column' takes its weights from the data, but no document has any; use data with a weight for "
    "every token, or another trainer"
)


@frozen(kw_only=True)
class Column(Trainer):
    """Token weights from the data, at every head that predicts the token.

    Documents without weights have weight 1; data in which no document has any is refused.
    """

    type = "column"

    def check_data(self, data: TokenDataset) -> Sequence[str]:
        """Refuse data in which no document has weights."""
        return [] if data.has_weights else [_NO_WEIGHTS]

    def token_weights(self, view: StepView) -> Tensor:
        """Return a weight for each token, ``[B, S]``.

        Raises:
            ConfigError: no document of the training data has weights.
        """
        if view.batch.weight is None:
            raise ConfigError(_NO_WEIGHTS)
        return view.batch.weight
