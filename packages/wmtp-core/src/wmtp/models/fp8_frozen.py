"""Frozen linear maps whose weights are kept in fp8 (arXiv 2209.05433).

A weight is rounded once, and takes half of bf16's memory. The numbers are those of casting at each product, since a weight that
does not change is rounded alike each time. What enters a product is measured and rounded anew. There is no gradient of the
weight. The files of the base stay as they are, and everything that is saved or exported comes from them.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from attrs import frozen
from torch import Tensor, nn

from wmtp.errors import WMTPError
from wmtp.loss.cross_entropy import implementation, precision

__all__ = [
    "FORMAT",
    "WIDE",
    "FrozenFp8Linear",
    "FrozenLinear",
    "Products",
    "check_original",
    "emulated",
    "round_by",
    "scale_to",
]

FORMAT: Final = torch.float8_e4m3fn
#: of gradients where one scale serves all of a tensor: they spread wider than what goes forward
WIDE: Final = torch.float8_e5m2


@frozen(kw_only=True)
class Products:
    """Settings of the products with a frozen weight, of ``[devices.fp8]``.

    Args:
        by_rows: rows have a scale each; else all of a tensor has one.
        fast_forward: the forward pass adds up in the tensor cores' own precision.
        fast_backward: so does the gradient of the input.
        emulate: rounds to fp8 and multiplies in fp32.
    """

    by_rows: bool
    fast_forward: bool
    fast_backward: bool
    emulate: bool


class FrozenFp8Linear(nn.Module):
    """A linear map with a weight in fp8, which never learns.

    Args:
        shape: of the weight.
        bias: as it was; None where there is none.
        device: of new memory for the weight.
        products: how it multiplies.
    """

    stored: Tensor
    scale: Tensor

    def __init__(self, shape: torch.Size, bias: nn.Parameter | None, device: torch.device, products: Products) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = bias
        self.products = products
        # Not among a model's tensors on disk: made again of the weight there. As bytes, which every backend sends and no change
        # of precision touches.
        self.register_buffer("stored", torch.empty(tuple(shape), dtype=torch.uint8, device=device), persistent=False)
        scales = (shape[0], 1) if products.by_rows else ()
        self.register_buffer("scale", torch.empty(scales, dtype=torch.float32, device=device), persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear, products: Products, device: torch.device) -> FrozenFp8Linear:
        """Round a weight on ``device``; the result is where the weight was."""
        weight = linear.weight.detach()
        made = cls(weight.shape, linear.bias, weight.device, products)
        if not weight.is_meta:
            # by way of bf16, in which a frozen weight is kept elsewhere, whatever its files have
            data, scale = _round(weight.to(device).to(torch.bfloat16), FORMAT, products.by_rows)
            made.stored.copy_(data.view(torch.uint8))
            made.scale.copy_(scale)
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """Rounded weight in bf16; not a parameter."""
        return (self.stored.view(FORMAT).float() * self.scale).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``.

        The result has the precision of x or of autocast.
        """
        dtype = precision(x)
        result = _Product.apply(x.to(dtype), self.stored, self.scale, self.products)
        return result if self.bias is None else result + self.bias.to(dtype)  # type: ignore[operator]

    def extra_repr(self) -> str:
        """Say what it is, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, fp8, frozen"


class FrozenLinear(FrozenFp8Linear):
    """Multiplication in bf16 by a rounded weight; see `wmtp.models.fp8.products_in_bf16`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``.

        The result has the precision of x or of autocast.
        """
        dtype = precision(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)  # type: ignore[arg-type]


def check_original(model: nn.Module) -> None:
    """Refuse base weights that fp8 has rounded.

    They are no longer the base's own.

    Raises:
        WMTPError: it has.
    """
    for name, module in model.named_modules():
        if isinstance(module, FrozenFp8Linear):
            raise WMTPError(
                f"{name} is kept in fp8, which has rounded its weight; merge the adapter that the run has saved, as wmtp "
                "export does: it is added to the weights in the base's files"
            )


class _Product(torch.autograd.Function):
    """Product x · Wᵀ in fp8, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, products: Products) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.products = products
        rounded, of_rows = _round_input(x.reshape(-1, x.shape[-1]), products)
        return _product(rounded, of_rows, stored, scale, x.dtype, products).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        rows = gradient.reshape(-1, gradient.shape[-1])
        stored, scale = ctx.saved_tensors
        found = _gradient_of_input(rows, stored, scale, ctx.products)
        return found.view(*gradient.shape[:-1], -1), None, None, None


def _round_input(rows: Tensor, products: Products) -> tuple[Tensor, Tensor]:
    """Round ``[T, K]`` to fp8, without gradient.

    Also returns what the numbers are multiplied by.
    """
    return _round(rows, FORMAT, products.by_rows)


def _product(rounded: Tensor, of_rows: Tensor, stored: Tensor, scale: Tensor, dtype: torch.dtype, products: Products) -> Tensor:
    """Compute x · Wᵀ ``[T, N]``.

    Args:
        rounded, of_rows: x by `_round_input`.
        stored, scale: W, ``[N, K]``, as `FrozenFp8Linear` has it.
        dtype: of the result.
        products: how to multiply.
    """
    data = stored.view(FORMAT)
    if products.emulate:
        return emulated(rounded.float() * of_rows, (data.float() * scale).t(), dtype)
    scales = {"scale_a": of_rows, "scale_b": scale.t() if products.by_rows else scale}
    return torch._scaled_mm(rounded, data.t(), **scales, out_dtype=dtype, use_fast_accum=products.fast_forward)


def _gradient_of_input(gradient: Tensor, stored: Tensor, scale: Tensor, products: Products) -> Tensor:
    """Compute the gradient of x, ``[T, K]``, from that of the product."""
    if products.by_rows:  # a scale of the weight belongs to a number of the sum here, so it goes to the other factor
        rounded, of_rows = _round(gradient.float() * scale.reshape(1, -1), FORMAT, True)
        scale = scale.new_ones(1, stored.shape[1])
    else:
        rounded, of_rows = _round(gradient, WIDE, False)
    flags = products.fast_backward, products.emulate
    return _gradient(rounded, of_rows, stored, scale, gradient.dtype, *flags)


def _round(tensor: Tensor, kind: torch.dtype, by_rows: bool) -> tuple[Tensor, Tensor]:
    """Return numbers in fp8, and what they are multiplied by."""
    scale = scale_to(tensor.abs().amax(dim=1, keepdim=True) if by_rows else tensor.abs().amax(), kind)
    return round_by(tensor, scale, kind), scale.reciprocal()


def scale_to(highest: Tensor, kind: torch.dtype) -> Tensor:
    """Return what makes the highest number a format's largest, in fp32."""
    # in float64, where compiled code and torch's own give one number
    return (torch.finfo(kind).max / highest.double().clamp(min=1e-12)).float()


def round_by(tensor: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Round ``tensor · scale`` to fp8."""
    limit = torch.finfo(kind).max
    return (tensor.float() * scale).clamp(-limit, limit).to(kind)


def emulated(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in fp32, whatever autocast says."""
    with torch.autocast(left.device.type, enabled=False):
        return (left @ right).to(dtype)


# An operator of its own, into which no compiler looks: it might transpose the weight in the forward pass and keep it.
@torch.library.custom_op("wmtp::frozen_fp8_gradient", mutates_args=())
def _gradient(
    rounded: Tensor, of_rows: Tensor, stored: Tensor, scale: Tensor, dtype: torch.dtype, fast: bool, emulate: bool
) -> Tensor:
    """Multiply a rounded gradient by W.

    Tensor cores read fp8 along the sum alone, so the weight is transposed.
    """
    if emulate:
        return emulated(rounded.float() * of_rows, stored.view(FORMAT).float() * scale, dtype)
    if implementation(stored.device, torch.bfloat16) == "fused":
        from wmtp.models import fp8_kernel  # imports Triton

        columns = fp8_kernel.transpose(stored)
    else:
        columns = stored.t().contiguous()
    scales = {"scale_a": of_rows, "scale_b": scale}
    return torch._scaled_mm(rounded, columns.view(FORMAT).t(), **scales, out_dtype=dtype, use_fast_accum=fast)


@_gradient.register_fake
def _(rounded: Tensor, of_rows: Tensor, stored: Tensor, scale: Tensor, dtype: torch.dtype, fast: bool, emulate: bool) -> Tensor:
    return rounded.new_empty((rounded.shape[0], stored.shape[1]), dtype=dtype)
