"""Linear maps with 4-bit weights (NF4, arXiv 2305.14314, §3), by bitsandbytes.

They work on GPUs and CPUs. Weights come back to the precision of the input for each product, in the forward and in the
backward pass, so that numbers are the same with and without gradient, and nothing of a weight's full size is kept between.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wmtp.errors import ConfigError
from wmtp.loss.cross_entropy import implementation, precision
from wmtp.models.adapter_names import is_adapter_name
from wmtp.models.anatomy import find_layers

__all__ = ["Linear4Bit", "dequantize", "dequantize_layers", "quantize_layers", "quiet_bitsandbytes"]

#: weights that share a scale
_BLOCK = 64


class Linear4Bit(nn.Module):
    """A linear map with a weight of 4 bits, which never learns.

    Args:
        shape: of the weight.
        bias: as it was; None where there is none.
        dtype: of the weight before.
        device: of new memory for the weight.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, shape: torch.Size, bias: nn.Parameter | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        _load_operators()
        self.out_features, self.in_features = shape
        self.bias = bias
        self.dtype = dtype
        size = shape.numel()
        # not among a model's tensors on disk: made again of the weight there
        self.register_buffer("packed", torch.empty((-(-size // 2), 1), dtype=torch.uint8, device=device), persistent=False)
        self.register_buffer("scales", torch.empty(-(-size // _BLOCK), device=device), persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear, device: torch.device) -> Linear4Bit:
        """Quantize on ``device``; the result is where the weight was."""
        weight = linear.weight.detach()
        made = cls(weight.shape, linear.bias, weight.dtype, torch.device("meta") if weight.is_meta else weight.device)
        if not weight.is_meta:
            packed, scales = torch.ops.bitsandbytes.quantize_4bit.default(
                weight.to(device).contiguous(), _BLOCK, "nf4", torch.uint8
            )
            made.packed.copy_(packed.view_as(made.packed))
            made.scales.copy_(scales)
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """Weight in its old precision; not a parameter."""
        return dequantize(self.packed, self.scales, self.out_features, self.in_features, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``.

        The result has the precision of x or of autocast.
        """
        dtype = precision(x)
        result = _linear(x.to(dtype), self.packed, self.scales, self.out_features, self.in_features)
        return result if self.bias is None else result + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Say what it is, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4"


# Operators of their own, into which no compiler looks: it would see the same weight made in both passes, and keep the first.


@torch.library.custom_op("wmtp::linear_4bit", mutates_args=())
def _linear(x: Tensor, packed: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """x · Wᵀ; its backward pass makes W anew."""
    return torch.nn.functional.linear(x, dequantize(packed, scales, rows, columns, x.dtype))


@torch.library.custom_op("wmtp::linear_4bit_backward", mutates_args=())
def _product_backward(gradient: Tensor, packed: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """Gradient of x in `_linear`."""
    return gradient @ dequantize(packed, scales, rows, columns, gradient.dtype)


@_linear.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@_product_backward.register_fake
def _(gradient: Tensor, packed: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], columns))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scales, *ctx.shape = inputs
    ctx.save_for_backward(packed, scales)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    """Pass the gradient of x on; the weight has none."""
    return _product_backward(gradient, *ctx.saved_tensors, *ctx.shape), None, None, None, None


_linear.register_autograd(_differentiate, setup_context=_keep)


def quantize_layers(base: PreTrainedModel, device: torch.device) -> None:
    """Quantize the linear maps of the decoder layers to 4 bits.

    Adapters stay as they are.

    Args:
        base: in place; may be on the meta device.
        device: where weights are quantized, one at a time.

    Raises:
        ConfigError: bitsandbytes is not installed, or there are no such maps.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError("4-bit weights need bitsandbytes: pip install 'wmtp-core[bnb]'")
    layers = find_layers(base, base.base_model, lambda reason: ConfigError(f"models.base.quantize: {reason}"))
    found = [
        (layer, name)
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not is_adapter_name(name)
    ]
    if not found:
        raise ConfigError("models.base.quantize: the decoder layers of this model have no nn.Linear to quantize; remove it")
    for layer, name in found:
        layer.set_submodule(name, Linear4Bit.of(layer.get_submodule(name), device))  # type: ignore[arg-type]


def dequantize_layers(base: nn.Module) -> None:
    """Put weights in their old precision back, in place."""
    for path, module in list(base.named_modules()):
        if isinstance(module, Linear4Bit):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.weight)
            linear.register_parameter("bias", module.bias)
            base.set_submodule(path, linear.train(module.training))


def dequantize(packed: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the weight ``[rows, columns]`` that 4 bits have left."""
    exact = torch.float32 if dtype == torch.float64 else dtype
    if implementation(packed.device, dtype) == "fused":
        from wmtp.models import nf4_kernel  # imports Triton

        out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
        return nf4_kernel.dequantize(packed, scales, _table(packed.device), out, block=_BLOCK)
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, scales, _BLOCK, "nf4", (rows, columns), exact).to(dtype)


@functools.cache
def _table(device: torch.device) -> Tensor:
    """Ask bitsandbytes for its 16 values."""
    codes = torch.arange(0, 256, 0x22, dtype=torch.uint8, device=device) + 1  # 0x01, 0x23 … 0xEF
    ones = torch.ones(1, device=device)
    return torch.ops.bitsandbytes.dequantize_4bit.default(codes[:, None], ones, _BLOCK, "nf4", (1, 16), torch.float32)[0]


def _load_operators() -> None:
    """Have bitsandbytes register its operators with torch."""
    with quiet_bitsandbytes():
        import bitsandbytes  # noqa: F401


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Silence what bitsandbytes, imported inside, says of kernels that are not used."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
