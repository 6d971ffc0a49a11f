"""Fp8 matrix products (arXiv 2209.05433) in a model's layers.

With one scale a tensor they are our own (`wmtp.models.fp8_linear`), with one a row torchao's. Either way a subclass of
`nn.Linear` that only multiplies otherwise takes its place and holds the same parameter, so names, optimizer and checkpoints
stay as they are; `products_in_bf16` makes use of that. Weights that never learn, under adapters, are kept in fp8:
`wmtp.models.fp8_frozen`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from wmtp.config.fp8_rules import fp8_misfits
from wmtp.errors import ConfigError
from wmtp.loss.fp8 import PIECE, Fp8Logits
from wmtp.models.adapter_names import is_adapter_name
from wmtp.models.fp8_frozen import FrozenFp8Linear, FrozenLinear, Products
from wmtp.models.fp8_linear import Fp8Linear
from wmtp.models.layers import repeated_layers

if TYPE_CHECKING:
    from wmtp.config.schema import DevicesConfig, Fp8Config
    from wmtp.models.mtp import MTPModel

__all__ = ["check_fp8", "fp8_logits", "multiply_in_fp8", "products_in_bf16"]

logger = logging.getLogger("wmtp")

#: of a GPU whose matrix units take fp8 and for which torchao's recipes are made: Hopper
_CAPABILITY: Final = (9, 0)


def check_fp8(devices: DevicesConfig, device: torch.device) -> None:
    """Refuse a device or torchao without fp8, before anything is read.

    Args:
        devices: the config section.
        device: that was picked.

    Raises:
        ConfigError: there are no fp8 products.
    """
    if devices.precision != "fp8":
        return
    fp8 = _options(devices)
    if fp8.recipe != "tensorwise":
        _torchao_config(fp8)
    if fp8.emulate:
        return
    instead = 'write "bf16-params", or devices.fp8.emulate = true to try it slowly'
    if device.type != "cuda" or torch.version.hip is not None:
        raise ConfigError(f"devices.precision: fp8 needs an NVIDIA GPU, and the run computes on {device.type}; {instead}")
    if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, found))
        raise ConfigError(f"devices.precision: fp8 needs Hopper or newer, and {name} has capability {version}; {instead}")


def multiply_in_fp8(
    model: MTPModel, devices: DevicesConfig, *, sharded: bool = False, device: torch.device | None = None
) -> int:
    """Have a model's layers multiply in fp8, if the config says so.

    Call it before copies or shards of parameters are made.

    Args:
        model: in place, on any device. Weights that never learn are kept in fp8.
        devices: the config section.
        sharded: the model will be divided; weights that never learn then stay in bf16, of which each process holds its part.
        device: where weights that never learn are rounded, one at a time. Default: where they are.

    Returns:
        number of maps that do.

    Raises:
        ConfigError: settings exclude this model, ``exclude`` names nothing, or no map is left.
    """
    if devices.precision != "fp8":
        return 0
    fp8 = _options(devices)
    maps = _linear_maps(model)
    problems = fp8_misfits(devices, hidden_size=model.hidden_size, layers=len(model.anatomy.layers))
    problems += [
        f"devices.fp8.exclude: {pattern!r} names no linear map of the layers; there are {_examples(maps)}"
        for pattern in fp8.exclude
        if not any(fnmatchcase(_plain(name), pattern) for name in maps)
    ]
    chosen = {id(module) for name, module in maps.items() if _fits(name, module, model, fp8)}
    if not chosen and not problems:
        problems = [
            f"devices.precision: no linear map of this model is left for fp8 ({_examples(maps)}); lower "
            'devices.fp8.min_features or exclude less, or write "bf16-params"'
        ]
    if problems:
        raise ConfigError(problems)
    kept = 0 if sharded else _keep_frozen(model, chosen, fp8, device)
    if fp8.recipe == "tensorwise":
        for module in _linear_maps(model).values():
            if id(module) in chosen:
                Fp8Linear.take_over(module, _products(fp8))
    else:
        _convert(model, chosen, fp8)
    if not devices.compile and not fp8.emulate:
        logger.warning("devices.precision: fp8 without devices.compile = true is slower than bf16: scaling is not fused")
    logger.info("fp8: %d of %d linear maps of the layers, %s", len(chosen), len(maps), fp8.recipe)
    if kept:
        logger.info(
            "fp8: the weights of %d of them never learn and are kept in fp8; the files of the base stay as they are", kept
        )
    elif sharded and model.adapter is not None and model.adapter.quantize is None:
        logger.info("fp8: the base stays in bf16, of which each process holds its part, and is rounded at each product")
    return len(chosen)


def _convert(model: MTPModel, chosen: set[int], fp8: Fp8Config) -> None:
    """Put torchao's modules in the places of chosen maps."""
    from torchao.float8 import convert_to_float8_training

    config = _torchao_config(fp8)
    for layer in repeated_layers(model):
        convert_to_float8_training(layer, config=config, module_filter_fn=lambda module, _: id(module) in chosen)


def _keep_frozen(model: MTPModel, chosen: set[int], fp8: Fp8Config, device: torch.device | None) -> int:
    """Replace an adapted base's chosen weights by fp8 ones.

    Returns their number.
    """
    products = _products(fp8)
    # adapted heads are saved whole, and so keep their own weights
    maps = _linear_maps(model).items() if model.adapter is not None else ()
    found = [(name, module) for name, module in maps if id(module) in chosen and name.startswith("base.")]
    for name, module in found:
        model.set_submodule(name, FrozenFp8Linear.of(module, products, device or module.weight.device))
    return len(found)


def _products(fp8: Fp8Config) -> Products:
    return Products(
        by_rows=fp8.recipe != "tensorwise",
        fast_forward=fp8.accumulates_fast != "none",
        fast_backward=fp8.accumulates_fast == "all",
        emulate=fp8.emulate,
    )


def fp8_logits(devices: DevicesConfig) -> Fp8Logits | None:
    """Translate ``devices.fp8.logits`` for the loss; None: they stay in bf16."""
    if devices.precision != "fp8" or (fp8 := _options(devices)).logits == "none":
        return None
    return Fp8Logits(
        gradient=fp8.logits == "hidden-gradient",
        fast=fp8.accumulates_fast != "none",
        emulate=fp8.emulate,
    )


@contextmanager
def products_in_bf16(model: nn.Module) -> Iterator[None]:
    """Multiply as the saved model will, with plain linear maps, inside.

    Weights that never learn and are kept in fp8 stay rounded, as 4-bit ones do.
    """
    maps = [(module, type(module)) for module in model.modules() if _is_fp8(module)]
    for module, own in maps:
        _become(module, FrozenLinear if own is FrozenFp8Linear else nn.Linear)
    try:
        yield
    finally:
        for module, own in maps:
            _become(module, own)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    # compiled code looks at a module's class again only where an attribute has changed
    module.turned = getattr(module, "turned", 0) + 1  # type: ignore[assignment]


def _options(devices: DevicesConfig) -> Fp8Config:
    from wmtp.config.schema import Fp8Config

    return devices.fp8 or Fp8Config()


def _linear_maps(model: MTPModel) -> dict[str, nn.Linear]:
    """List the linear maps in the repeated layers by name.

    Those of adapters are not among them.
    """
    inside = {id(module) for layer in repeated_layers(model) for module in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside and not is_adapter_name(name)
    }


def _plain(name: str) -> str:
    """Name a map as in the model without its adapter."""
    return name.removesuffix(".base_layer")


def _fits(name: str, module: nn.Linear, model: MTPModel, fp8: Fp8Config) -> bool:
    sizes = module.in_features, module.out_features
    if min(sizes) < fp8.min_features or any(size % PIECE for size in sizes):
        return False
    if any(fnmatchcase(_plain(name), pattern) for pattern in fp8.exclude):
        return False
    layers = list(model.anatomy.layers)
    spared = layers[: fp8.first_layers] + (layers[-fp8.last_layers :] if fp8.last_layers else [])
    return not any(module is inner for layer in spared for inner in layer.modules())


def _examples(maps: dict[str, nn.Linear]) -> str:
    if not maps:
        return "none"
    shown = [f"{name} ({module.in_features} to {module.out_features} features)" for name, module in list(maps.items())[:2]]
    return ", ".join(shown) + (f" and {len(maps) - 2} more" if len(maps) > 2 else "")


def _is_fp8(module: nn.Module) -> bool:
    return type(module) in (FrozenFp8Linear, Fp8Linear) or type(module).__module__ == "torchao.float8.float8_linear"


def _torchao_config(fp8: Fp8Config) -> Any:
    """Translate the options into torchao's."""
    try:
        from torchao.float8 import Float8GemmConfig, Float8LinearConfig
    except ImportError as error:
        raise ConfigError(
            f'devices.fp8.recipe: "{fp8.recipe}" needs torchao, which cannot be imported here ({error}); '
            "pip install 'wmtp-core[fp8]', or write \"tensorwise\", which needs nothing"
        ) from error
    recipe = Float8LinearConfig.from_recipe_name(fp8.recipe.replace("gw-hp", "with_gw_hp").replace("-", "_"))
    forward = Float8GemmConfig(use_fast_accum=fp8.accumulates_fast != "none")
    backward = Float8GemmConfig(use_fast_accum=fp8.accumulates_fast == "all")
    return replace(
        recipe,
        gemm_config_output=forward,
        gemm_config_grad_input=backward,
        gemm_config_grad_weight=backward,
        emulate=fp8.emulate,
        pad_inner_dim=True,  # the number of tokens need not divide by 16
    )
