"""AdamW with its state in 8 bits, by bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from wmtp.errors import ConfigError
from wmtp.optim.build import decay_groups

if TYPE_CHECKING:
    from wmtp.optim.config import AdamW8bit

__all__ = ["build_adamw_8bit"]


def build_adamw_8bit(config: AdamW8bit, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Make AdamW with one group that decays and one that does not.

    Raises:
        ConfigError: bitsandbytes cannot do it here.
    """
    kinds = {parameter.device.type for _, parameter in parameters}
    if problems := [f"optimizer.{line}" for kind in sorted(kinds) for line in config.check_device(kind)]:
        raise ConfigError(problems)
    if any(isinstance(parameter, DTensor) for _, parameter in parameters):
        raise ConfigError(
            "optimizer.type: 'adamw-8bit' takes whole parameters, which FSDP divides; set devices.fsdp.strategy = \"none\""
        )
    from bitsandbytes.optim import AdamW8bit as Adam8bit
    from bitsandbytes.optim import PagedAdamW8bit

    kind = PagedAdamW8bit if config.paged else Adam8bit
    groups = decay_groups(parameters, config.weight_decay)
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
