"""Config classes of the built-in optimizers. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import and_, deep_iterable, ge, gt, lt

from wmtp.plugins.contract import OptimizerConfig

if TYPE_CHECKING:
    import torch

__all__ = ["AdamW", "AdamW8bit", "Muon"]


@frozen(kw_only=True)
class AdamW(OptimizerConfig):
    """AdamW (arXiv 1711.05101), fused where the device has it.

    Args:
        lr: the peak learning rate.
        betas: decay of the running means of gradient and squared gradient.
        eps: added to the denominator.
        weight_decay: of weight matrices; biases, norms and other vectors have none.
    """

    type = "adamw"
    lr: float = field(default=2e-5, validator=[gt(0.0), lt(math.inf)])
    betas: tuple[float, float] = field(default=(0.9, 0.95), validator=deep_iterable(and_(ge(0.0), lt(1.0))))
    eps: float = field(default=1e-8, validator=[gt(0.0), lt(math.inf)])
    weight_decay: float = field(default=0.0, validator=[ge(0.0), lt(math.inf)])

    def build(self, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer for ``(name, parameter)`` pairs."""
        from wmtp.optim.build import build_adamw

        return build_adamw(self, parameters)


@frozen(kw_only=True)
class AdamW8bit(AdamW):
    """AdamW with 8-bit running means (arXiv 2110.02861), by bitsandbytes.

    They are quantized in blocks of 256: 2 bytes a parameter in place of 8. Parameters of fewer than 4,096 numbers keep theirs
    in fp32. On GPUs and CPUs; several processes each hold the model whole.

    Args:
        lr: the peak learning rate.
        betas: decay of the running means of gradient and squared gradient.
        eps: added to the denominator.
        weight_decay: of weight matrices; biases, norms and other vectors have none.
        paged: let the driver move the means to the host's memory while a GPU needs its own for something else.
    """

    type = "adamw-8bit"
    takes_whole_only = True
    state_bytes = 2
    needs_packages = {"bitsandbytes": "wmtp-core[bnb]"}  # noqa: RUF012
    paged: bool = False

    def check_device(self, device: str) -> Iterable[str]:
        """Refuse paging without a GPU, and devices without kernels."""
        if self.paged and device != "cuda":
            yield f"paged: memory is paged between a GPU and its host, and the run computes on {device}; remove it"
        if device not in ("cuda", "cpu"):
            yield f"type: 'adamw-8bit' computes on NVIDIA GPUs and on CPUs, and the run on {device}; write type = \"adamw\""

    def build(self, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer for ``(name, parameter)`` pairs."""
        from wmtp.optim.eight_bits import build_adamw_8bit

        return build_adamw_8bit(self, parameters)


@frozen(kw_only=True)
class Muon(OptimizerConfig):
    """Muon: orthogonalized momentum for the weight matrices of the layers.

    Jordan et al., 2024; scaled as in arXiv 2502.16982. Embeddings, unembeddings, biases and norms are learned by AdamW with the
    same learning rate, for which the update of a matrix is scaled to the size of an AdamW update.

    Args:
        lr: the peak learning rate.
        momentum: of the matrices' gradients.
        weight_decay: of weight matrices.
        betas: AdamW's, for everything else.
        eps: AdamW's.
    """

    type = "muon"
    lr: float = field(default=2e-5, validator=[gt(0.0), lt(math.inf)])
    momentum: float = field(default=0.95, validator=[ge(0.0), lt(1.0)])
    weight_decay: float = field(default=0.0, validator=[ge(0.0), lt(math.inf)])
    betas: tuple[float, float] = field(default=(0.9, 0.95), validator=deep_iterable(and_(ge(0.0), lt(1.0))))
    eps: float = field(default=1e-8, validator=[gt(0.0), lt(math.inf)])

    def build(self, parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer for ``(name, parameter)`` pairs."""
        from wmtp.optim.build import build_muon

        return build_muon(self, parameters)
