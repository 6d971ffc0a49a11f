"""Config classes of the built-in optimizers. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge, gt

if TYPE_CHECKING:
    import torch

__all__ = ["AdamW"]


@frozen(kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101), fused where the device has it.

    Args:
        lr: the peak learning rate.
        betas: decay of the running means of gradient and squared gradient.
        eps: added to the denominator.
        weight_decay: of weight matrices; biases, norms and other vectors have none.
    """

    type = "adamw"
    lr: float = field(default=2e-5, validator=gt(0.0))
    betas: tuple[float, float] = field(default=(0.9, 0.95))
    eps: float = field(default=1e-8, validator=gt(0.0))
    weight_decay: float = field(default=0.0, validator=ge(0.0))

    @betas.validator
    def _check_betas(self, _: object, value: tuple[float, float]) -> None:
        if not all(0.0 <= beta < 1.0 for beta in value):
            raise ValueError("both must be at least 0 and less than 1")

    def build(self, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer for ``(name, parameter)`` pairs."""
        from wmtp.training.optimizers import build_adamw

        return build_adamw(self, parameters)
