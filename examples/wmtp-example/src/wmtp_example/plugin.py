"""What this package adds to WMTP. It is read whenever `wmtp` starts, so it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

import wmtp

if TYPE_CHECKING:
    from wmtp_example.trainer import RareTokenTrainer

__all__ = ["RareToken", "wmtp_trainers"]


@attrs.frozen(kw_only=True)
class RareToken:
    """Learns more from tokens that are rare in the batch.

    Args:
        power: p in w = (n / count)^p; 0 is plain multi-token prediction, 1 gives every distinct token the same total weight.
        max_weight: weights are cut off there, in units of their mean.
    """

    type = "rare-token"
    power: float = attrs.field(default=0.5, validator=[attrs.validators.ge(0.0), attrs.validators.le(1.0)])
    max_weight: float = attrs.field(default=5.0, validator=attrs.validators.ge(1.0))

    def build(self) -> RareTokenTrainer:
        """Make the trainer; only this imports torch."""
        from wmtp_example.trainer import RareTokenTrainer

        return RareTokenTrainer(self.power, self.max_weight)


@wmtp.hookimpl
def wmtp_trainers() -> list[type]:
    """The algorithms of this package."""
    return [RareToken]
