"""Load balancing of a mixture of experts over a whole step.

Switch Transformer, arXiv 2101.03961, eq. 4 to 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as F

from wmtp.errors import ConfigError
from wmtp.models.config_fields import field

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["CHOICES", "PROBABILITIES", "RouterLoss"]

#: names of what is observed of each token, averaged over layers: ``[b, S, E]``
PROBABILITIES: Final = "probabilities of the router"
CHOICES: Final = "choices of the router"


@frozen(kw_only=True)
class RouterLoss:
    """Auxiliary loss of transformers for models with ``output_router_logits``.

        E · Σ_i f_i · P_i        f_i: how often expert i is chosen a token and layer; P_i: its mean probability

    Over all tokens of the step, however they are divided, so the gradient of P_i needs the f_i of all before.

    Args:
        weight: ``router_aux_loss_coef`` of the config.
        top_k: experts that a token is given.
    """

    weight: float
    top_k: int

    @classmethod
    def of(cls, model: MTPModel) -> RouterLoss | None:
        """Read a model's config; None where it does not ask.

        Raises:
            ConfigError: it asks, and does not say for how much or how many.
        """
        config = model.base.config
        if not field(config, "output_router_logits", False):
            return None
        weight = field(config, "router_aux_loss_coef")
        top_k: Any = getattr(model.base, "num_experts_per_tok", None) or field(config, "num_experts_per_tok")
        if not isinstance(weight, int | float) or not isinstance(top_k, int):
            raise ConfigError(
                "models.base: output_router_logits in its config asks for the balance of its router, and router_aux_loss_coef "
                "or num_experts_per_tok is missing there; add them, or set output_router_logits to false"
            )
        return cls(weight=float(weight), top_k=top_k)

    def observe(self, logits: Sequence[Tensor], shape: torch.Size) -> dict[str, Tensor]:
        """Average probabilities and choices over layers.

        Args:
            logits: of each layer, ``[b · S, E]``.
            shape: ``[b, S]``.

        Raises:
            ConfigError: the model has no router that transformers records.
        """
        if not logits:
            raise ConfigError(
                "models.base: output_router_logits in its config asks for the balance of its router, and it gives no router's "
                "logits; set that to false"
            )
        probabilities = [F.softmax(layer, dim=-1) for layer in logits]
        mean = torch.stack([layer.float() for layer in probabilities]).mean(0)
        with torch.no_grad():
            chosen = torch.stack([torch.topk(layer, self.top_k, dim=-1).indices for layer in probabilities])
            choices = F.one_hot(chosen, mean.shape[-1]).sum(-2).float().mean(0)
        return {PROBABILITIES: mean.view(*shape, -1), CHOICES: choices.view(*shape, -1)}

    def balance(self, observed: Mapping[str, Tensor], real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss before its weight, and metrics to log.

        It carries a gradient with respect to the probabilities.

        Args:
            observed: of the whole step, as `observe` gives it.
            real: ``[B, S]`` bool, no padding.
        """
        count = real.sum()
        mask = real.unsqueeze(-1)
        chosen = (observed[CHOICES].detach() * mask).sum((0, 1)) / count
        probability = (observed[PROBABILITIES] * mask).sum((0, 1)) / count
        experts = len(chosen)
        balance = experts * (chosen * probability).sum()
        load = chosen * (experts / self.top_k)  # 1 where all are chosen alike
        return balance, {"router/balance": balance.detach(), "router/load_max": load.max(), "router/load_min": load.min()}
