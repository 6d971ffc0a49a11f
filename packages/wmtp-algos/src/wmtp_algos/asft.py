"""asft: dynamic fine-tuning that is anchored to the start model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen
from attrs.validators import ge, lt

from wmtp import Trainer, TrainerConfig
from wmtp_algos.config import IS_DEVICE

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import HiddenView, StepView, TrainerSetup

__all__ = ["ASFT", "ASFTTrainer"]


@frozen(kw_only=True)
class ASFT(TrainerConfig):
    """Dynamic fine-tuning anchored to the start model (Zhu et al., arXiv 2509.23753).

    Anchored supervised fine-tuning: `dft` plus λ · KL to the start model.

        L = Σ α p CE / Z  +  λ · mean over tokens KL(p₀ ‖ p_θ)        p = exp(−CE), without gradient

    The weight p lets likely tokens drown out all others, which the model drifts after; the second term holds head 1's whole
    distribution near that of ``[models.base]`` as it was. KL is over the vocabulary, by chunks, of each token to learn; in the
    direction of the authors' code. Heads 2..H had no distribution at the start, and have no such term. Published with the mean
    over tokens: set ``train.normalizer = "valid"``. Costs the start model's memory and forward pass.

    Args:
        kl_weight: λ; 0 gives `dft`. The authors' default is 0.1.
        reference_precision: of the start model's parameters and products; ``bf16`` needs half the memory.
        reference_device: where the start model computes: ``cpu``, ``cuda``, ``cuda:1`` … Default: where the trained model does.
    """

    type = "asft"
    required_models = ("base",)
    published_normalizer = "valid"
    kl_weight: float = field(default=0.1, validator=[ge(0.0), lt(math.inf)])
    reference_precision: Literal["fp32", "bf16"] = "fp32"
    reference_device: str | None = field(default=None, validator=IS_DEVICE)

    def build(self) -> Trainer:
        """Make the trainer."""
        return ASFTTrainer(self)


class ASFTTrainer(Trainer):
    """Weights of `dft`, and an auxiliary loss ``anchor``.

    Args:
        config: see `ASFT`.
    """

    needs_token_loss = True

    def __init__(self, config: ASFT) -> None:
        self._config = config

    def setup(self, setup: TrainerSetup) -> None:
        """Load the start model."""
        from wmtp_algos.reference import open_reference

        if self._config.kl_weight:
            self._start = open_reference(self._config, setup, "base")

    def observe(self, view: HiddenView) -> Mapping[str, Tensor]:
        """Observe ``anchor_kl``, KL(p₀ ‖ p_θ) at each place: ``[b, S]``, with gradient."""
        from wmtp_algos.reference import divergence

        return {"anchor_kl": divergence(self._start, view)} if self._config.kl_weight else {}

    def token_weights(self, view: StepView) -> Tensor:
        """See `Trainer.token_weights`; p, ``[B, S, H]``."""
        return (-view.token_loss).exp()

    def auxiliary_losses(self, view: StepView) -> Mapping[str, Tensor]:
        """``anchor``: λ times the mean over head 1's valid predictions."""
        from wmtp_algos.reference import mean_divergence

        kl = view.observations.get("anchor_kl")
        return {} if kl is None else {"anchor": self._config.kl_weight * mean_divergence(view, kl)}

    def token_details(self, view: StepView) -> Mapping[str, Tensor]:
        """``anchor_kl`` of each token's own prediction, ``[B, S, H]``: at head 1."""
        from wmtp_algos.reference import by_head

        kl = view.observations.get("anchor_kl")
        return {} if kl is None else {"anchor_kl": by_head(view, kl)}
