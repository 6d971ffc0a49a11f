"""Low-rank adapters (LoRA, arXiv 2106.09685), by PEFT.

They go into the decoder layers of a model, and into those of its heads where asked for. peft puts a module of its own in the
place of each linear map, with the map inside, so that forward passes, compiled layers and sharding see ordinary layers. Names
of parameters are peft's; those that learn have a part that begins with ``lora_``.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import frozen
from torch import Tensor, nn

from wmtp.errors import FileError
from wmtp.models.adapter_names import ADAPTER_NAME, is_adapter_name, saved_name
from wmtp.models.adapter_targets import targets_within
from wmtp.models.drawing import seeded
from wmtp.models.fp8_frozen import check_original
from wmtp.models.quantized import Linear4Bit, dequantize_layers, quantize_layers, quiet_bitsandbytes
from wmtp.models.tensor_fit import misfits

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = [
    "Adapter",
    "BaseModelName",
    "adapter_off",
    "fingerprint",
    "inject",
    "merge",
    "put_on",
    "quantize_base",
]

_SAMPLES = 64


@frozen(kw_only=True)
class BaseModelName:
    """Name of the model that an adapter belongs to.

    Args:
        name: what peft shall open: ``org/name`` of the hub, or a local path.
        revision: of the hub.
        uri: what the run's config had as ``models.base.uri``.
    """

    name: str
    revision: str | None = None
    uri: str | None = None


@frozen(kw_only=True, eq=False)
class Adapter:
    """Adapter of a model.

    Args:
        config: peft's ``LoraConfig``, whose targets are names of modules.
        base: the model that it belongs to; None where it is of no file.
        fingerprint: of that model's numbers; see `fingerprint`.
        quantize: how the weights of its layers are kept while the adapter learns; None: as they are.
        in_heads: heads 2..H have adapters of their own, and learn nothing else.
        is_new: it began with this model, and changes nothing yet.
    """

    config: Any
    base: BaseModelName | None
    fingerprint: str
    quantize: Literal["nf4"] | None = None
    in_heads: bool = False
    is_new: bool = False


def put_on(
    model: MTPModel,
    config: Any,
    *,
    seed: int,
    base: BaseModelName | None = None,
    state: Mapping[str, Tensor] | None = None,
    known: str | None = None,
    quantize: Literal["nf4"] | None = None,
    in_heads: bool = False,
    head_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Add an adapter to a model's own layers.

    From now on nothing but the adapter and heads 2..H can learn.

    Args:
        model: in place; may be on the meta device.
        config: peft's ``LoraConfig``.
        seed: of a new adapter, which changes nothing until it has learned.
        base: the model that the adapter belongs to.
        state: the adapter's tensors, by `saved_name`. Default: a new adapter.
        known: the fingerprint of the model, where its numbers are not here.
        quantize: how its weights shall be kept; see `quantize_base`.
        in_heads: put adapters of the same settings into heads 2..H as well, which then learn nothing else.
        head_state: the tensors of these, by `saved_name`. Default: new ones.

    Raises:
        WMTPError: the tensors do not fit.
        ConfigError: no target is in the heads.
    """
    numbers = known or fingerprint(model.base)
    config.lora_dropout = 0.0  # weights and loss of a step are of one forward pass
    with seeded(seed):
        inject(model.base, config, state)
        if in_heads:
            inject(model.extra_heads, _config_within(model.extra_heads, config), head_state)
    config.base_model_name_or_path = None if base is None else base.name
    config.revision = None if base is None else base.revision
    own = {"fingerprint": numbers, "quantize": quantize, "in_heads": in_heads, "is_new": state is None}
    model.adapter = Adapter(config=config, base=base, **own)


def _config_within(heads: nn.Module, config: Any) -> Any:
    """Narrow an adapter's settings to the targets in the heads.

    A target that names a single layer of the base is in none of them.
    """
    own = copy.copy(config)
    own.target_modules = targets_within(heads, config.target_modules)
    return own


def quantize_base(model: MTPModel, device: torch.device | None = None) -> None:
    """Quantize the base as its adapter asks.

    Heads 2..H and the adapter itself stay as they are.

    Args:
        model: in place.
        device: where weights are quantized, one at a time. Default: where they are.
    """
    if model.adapter is not None and model.adapter.quantize is not None:
        quantize_layers(model.base, device or model.anatomy.output.weight.device)
        if model.adapter.is_new and model.adapter.config.use_dora:
            _measure_lengths(model.base)


@torch.no_grad()
def _measure_lengths(base: nn.Module) -> None:
    """Have a new DoRA adapter begin with the lengths in 4 bits.

    With those of the whole weights it would change the model before it has learned.
    """
    for module in base.modules():
        if _is_adapted(module) and ADAPTER_NAME in module.lora_magnitude_vector:  # type: ignore[operator]
            inner, lengths = module.get_base_layer(), module.lora_magnitude_vector[ADAPTER_NAME].weight  # type: ignore[operator,index]
            if isinstance(inner, Linear4Bit) and not lengths.is_meta:
                lengths.copy_(inner.weight.norm(dim=1))


def inject(base: nn.Module, config: Any, state: Mapping[str, Tensor] | None = None) -> None:
    """Have PEFT add its modules to a model, and fill them.

    ``base`` may be a part of a model.

    Args:
        base: in place; may be on the meta device.
        config: peft's ``LoraConfig``.
        state: as for `put_on`. Default: torch's random numbers.

    Raises:
        WMTPError: the tensors do not fit.
    """
    with quiet_bitsandbytes():
        import peft

        from wmtp.models.low_rank_layers import use_one_operator

    training, is_meta = base.training, any(parameter.is_meta for parameter in base.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # intended, or refused before
        peft.inject_adapter_in_model(config, base, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=is_meta)
    base.train(training)
    use_one_operator(base)
    if not isinstance(config.target_modules, str):  # a pattern stays
        config.target_modules = sorted(config.target_modules)
    if state is not None:
        _fill(base, state)


def _fill(base: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = {saved_name(name): tensor for name, tensor in base.named_parameters() if is_adapter_name(name)}
    if problems := misfits({name: tuple(tensor.shape) for name, tensor in own.items()}, state):
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FileError(
            f"the tensors of the adapter do not fit its base: {'; '.join(problems[:5])}{more}; name the model that it was "
            "trained on: models.base.base_uri"
        )
    for name, tensor in state.items():
        own[name].data = tensor.detach().clone()


def fingerprint(base: nn.Module) -> str:
    """Hash a sample of each of a model's tensors.

    The hash is the same in every precision; it is empty for a model on the meta device.
    """
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        if parameter.is_meta:
            return ""
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].to(torch.bfloat16).view(torch.int16).cpu().contiguous()
        digest.update(f"{name} {list(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def merge(base: nn.Module) -> None:
    """Merge an adapter into its weights, and remove PEFT's modules.

    ``base`` is a model or a part of one; sums are in fp32 at least. What 4 bits have left of a
    weight counts: the adapter was learned on that.

    Raises:
        WMTPError: the weights are kept in fp8, which is for training alone.
    """
    check_original(base)
    dequantize_layers(base)
    adapted: list[tuple[str, Any]] = [(name, module) for name, module in base.named_modules() if _is_adapted(module)]
    for _, module in adapted:
        inner = module.get_base_layer()
        dtype = next(inner.parameters()).dtype
        module.to(torch.promote_types(dtype, torch.float32))
        module.merge(safe_merge=True)
        inner.to(dtype)
    for name, module in adapted:
        if not name.endswith(".base_layer"):  # experts have an adapter for each of their tensors, one around the other
            base.set_submodule(name, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.requires_grad_(True)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Disable the adapter inside: compute as the base model does.

    Gradients flow as before.

    Args:
        model: an `MTPModel` or a part of one. Without an adapter nothing changes.
    """
    layers: list[Any] = [module for module in model.modules() if _is_adapted(module)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:  # peft's own switch would change what learns too
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def _is_adapted(module: nn.Module) -> bool:
    if not hasattr(module, "lora_A"):  # spares models without adapters the import
        return False
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)
