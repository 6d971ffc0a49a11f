"""From the last hidden state to a model's logits."""

from __future__ import annotations

from itertools import product
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wmtp.loss import Unembedding
from wmtp.models.config_fields import field

__all__ = ["SCALE_NAMES", "SOFTCAP_NAMES", "called_between", "find_transform"]

# What models call the factor of their logits, and their cap. Which one is used, and how, is found by trying.
SCALE_NAMES: Final = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")
SOFTCAP_NAMES: Final = ("final_logit_softcapping", "softcap", "logits_soft_cap", "output_logit_soft_cap")


def called_between(model: PreTrainedModel, decoder: nn.Module, output: nn.Module, ids: Tensor) -> list[str]:
    """Name the modules called between the decoder and the unembedding."""
    called: list[str] = []
    others = [module for module in model.children() if module is not decoder and module is not output]
    handles = [module.register_forward_pre_hook(lambda module, _: called.append(type(module).__name__)) for module in others]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return called


def find_transform(model: PreTrainedModel, logits: Tensor, expected: Tensor) -> dict[str, Any] | None:
    """Find the `Unembedding` settings that reproduce a model's logits.

    Bit for bit.
    """

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = (field(model.config, name) for name in names)
        return [float(value) for value in values if isinstance(value, int | float) and value]

    scales = [(1.0, False)]
    for value in numbers(SCALE_NAMES):
        scales += [(value, False), (1.0 / value, True)]
    caps = [*numbers(SOFTCAP_NAMES), None]
    for (scale, divides), softcap, float32 in product(scales, caps, (False, True)):
        settings = {"scale": scale, "divides": divides, "softcap": softcap, "float32": float32}
        attempt = Unembedding(weight=logits, **settings).transform(logits)
        if attempt.dtype == expected.dtype and torch.equal(attempt, expected):
            # fp32 logits stay as they are: asking for fp32 again would only hide the model's own precision
            return settings
    return None
