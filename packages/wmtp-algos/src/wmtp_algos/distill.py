"""distill: learn the data and a reference model's whole distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen
from attrs.validators import gt, lt

from wmtp import Trainer, TrainerConfig
from wmtp_algos.config import IS_DEVICE

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import HiddenView, StepView, TrainerSetup

__all__ = ["Distill", "DistillTrainer"]


@frozen(kw_only=True)
class Distill(TrainerConfig):
    """Distillation from a reference model (Hinton et al., arXiv 1503.02531).

    The cross entropy plus λ · KL to the reference:

        L = Σ α CE / Z  +  λ · mean over tokens KL(p_ref ‖ p_θ)

    Every prediction of the data has weight 1. KL is over the vocabulary, at temperature 1, of each of head 1's predictions to
    learn, on the data's own tokens; heads 2..H learn the data alone. A control of `rho1-wmtp`, which uses the same reference to
    choose tokens: what of its gain a teacher gives. The reference is ``[models.ref]``, frozen, with the base model's
    vocabulary, which is checked token by token. Costs its memory, a forward pass, and logits of two models.

    Args:
        kl_weight: λ. Of the loss of head 1 alone, λ / (1 + λ) comes from the reference.
        reference_precision: of the reference's parameters and products; ``bf16`` needs half the memory.
        reference_device: where the reference computes: ``cpu``, ``cuda``, ``cuda:1`` … Default: where the model does.
    """

    type = "distill"
    required_models = ("ref",)
    kl_weight: float = field(default=1.0, validator=[gt(0.0), lt(math.inf)])
    reference_precision: Literal["fp32", "bf16"] = "fp32"
    reference_device: str | None = field(default=None, validator=IS_DEVICE)

    def build(self) -> Trainer:
        """Make the trainer."""
        return DistillTrainer(self)


class DistillTrainer(Trainer):
    """Uniform weights, and an auxiliary loss ``distill``.

    Args:
        config: see `Distill`.
    """

    def __init__(self, config: Distill) -> None:
        self._config = config

    def setup(self, setup: TrainerSetup) -> None:
        """Load the reference."""
        from wmtp_algos.reference import open_reference

        self._reference = open_reference(self._config, setup, "ref")

    def observe(self, view: HiddenView) -> Mapping[str, Tensor]:
        """Observe ``reference_kl``, KL(p_ref ‖ p_θ) at each place: ``[b, S]``, with gradient."""
        from wmtp_algos.reference import divergence

        return {"reference_kl": divergence(self._reference, view)}

    def auxiliary_losses(self, view: StepView) -> Mapping[str, Tensor]:
        """``distill``: λ times the mean over head 1's valid predictions."""
        from wmtp_algos.reference import mean_divergence

        return {"distill": self._config.kl_weight * mean_divergence(view, view.observations["reference_kl"])}

    def token_details(self, view: StepView) -> Mapping[str, Tensor]:
        """``reference_kl`` of each token's own prediction, ``[B, S, H]``: at head 1."""
        from wmtp_algos.reference import by_head

        return {"reference_kl": by_head(view, view.observations["reference_kl"])}
