"""Activation checkpointing, compilation and faster attention, layer by layer.

They come before sharding (`wmtp.models.layers`). Checkpointing and compilation replace a layer's ``forward`` and leave the
layer itself, its hooks and its name where they are: state dicts do not change, and what is recorded of a layer's call
(`wmtp.models.anatomy.record_call`) stays outside of the compiled code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import Cache

from wmtp.models.anatomy import LayerCall
from wmtp.models.documents import within_reading
from wmtp.models.few_rows import compile_few_rows
from wmtp.models.layer_steps import has_known_parts, step_of
from wmtp.models.layers import repeated_layers
from wmtp.models.low_rank import OPERATORS
from wmtp.models.low_rank_graph import compile_adapted
from wmtp.models.prompt_steps import prompt_of
from wmtp.models.step_cache import layer_number, layers_are_plain, steps_are_compiled, swap_caches

if TYPE_CHECKING:
    from wmtp.config.schema import DevicesConfig
    from wmtp.models.mtp import MTPModel

__all__ = ["accelerate", "checkpoint_activations", "compile_layers", "offload_inputs"]

#: Variants of one layer's code before torch gives up compiling it. Stages, evaluation, packing and ragged rows each ask for
#: one; torch's own limit, 8, is less than what a run with several stages needs.
_VARIANTS = 64


def accelerate(model: MTPModel, devices: DevicesConfig, *, learns: bool = True) -> None:
    """Apply the options of ``[devices]`` to a model, in their required order.

    Args:
        model: in place, where it computes.
        devices: the config section.
        learns: whether it has a backward pass at all.
    """
    device = next(model.parameters()).device
    if devices.attention == "auto" and device.type == "cuda":
        model.use_block_attention()
    if learns:
        checkpoint_activations(model, devices.activation_checkpointing, fp8=devices.precision == "fp8")
    if devices.compile:
        compile_layers(model)
    if learns and devices.activation_checkpointing == "offload":
        offload_inputs(model)


def checkpoint_activations(
    model: MTPModel, mode: Literal["none", "full", "selective", "offload"], *, fp8: bool = False
) -> None:
    """Turn on activation checkpointing for every repeated layer.

    Args:
        model: in place.
        mode: ``full`` keeps a layer's input alone; ``selective`` keeps the results of matrix products and of attention too,
            so that only what is cheap is computed again; ``offload`` is ``full`` here, and `offload_inputs` the rest of it;
            ``none`` leaves the model as it is.
        fp8: the layers multiply in fp8, by autograd functions.
    """
    if mode == "none":
        return
    # whoever compiles a region that chooses what to keep is told to have no operators in place there; there are none
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_news)
    for layer in repeated_layers(model):
        layer.forward = MethodType(_full_in_fp8 if fp8 and mode != "selective" else _CHECKPOINTED[mode], layer)


def _is_news(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


def compile_layers(model: MTPModel) -> None:
    """Compile the repeated layers and the final norm, which all heads apply.

    The layers of a model share their code, so it is compiled once for all of them, when it first runs; again where something
    is different: what learns, no gradient at all, other shapes.

    Args:
        model: in place, after `checkpoint_activations`.
    """
    # Otherwise torch 2.11 to 2.13 takes the parameters of a module for what they were when it compiled, and a layer that was
    # frozen then gets no gradient in the stage in which it learns. Looking at them costs no time that can be measured.
    torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 8 * _VARIANTS)
    model.compiled_layers = True
    compiled = torch.compile if model.adapter is None else compile_adapted
    for layer in (*repeated_layers(model), *model.anatomy.tail):
        plain = layer.forward
        # steps of decoding have few shapes, each of which is worth code of its own
        step = step_of(layer, compile_few_rows(plain))
        layer.forward = partial(_forward, compiled(plain), step, prompt_of(layer, plain), plain, layer_number(layer))
    if has_known_parts(model.anatomy.decoder):  # angles of positions: for a step some ten kernels otherwise
        for module in model.anatomy.decoder.children():
            if not any(True for _ in module.parameters()):
                plain = module.forward
                module.forward = partial(_forward, plain, compile_few_rows(plain), plain, plain, None)


def offload_inputs(model: MTPModel) -> None:
    """Offload the inputs of the trunk's layers to host memory.

    They come back for the backward pass. The heads read the last layer's result, which stays where it is: the loss needs it.

    Args:
        model: in place, after `compile_layers`: a compiled layer's own code knows nothing of it.
    """
    for layer in model.anatomy.layers[:-1]:
        layer.forward = partial(_offloaded, layer.forward)


def _offloaded(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (args and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    place, shape = args[0].data_ptr(), args[0].shape

    # Parameters and masks are saved too, where the layer is compiled. They stay: none of them is freed by it.
    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.data_ptr() != place or tensor.shape != shape:
            return tensor
        host = torch.empty(shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)


def _forward(
    compiled: Callable[..., Any],
    step: Callable[..., Any],
    prompt: Callable[..., Any],
    plain: Callable[..., Any],
    number: int | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a layer compiled, where its shapes recur.

    With a cache that grows with each token, and so has as many shapes, it runs uncompiled.
    """
    if layers_are_plain():
        return plain(*args, **kwargs)
    if not any(_has_cache(value) for value in (*args, *kwargs.values())):
        return (step if steps_are_compiled() else compiled)(*args, **kwargs)
    if number is None or not steps_are_compiled():
        return prompt(*args, **kwargs)
    args = tuple(swap_caches(value, number) for value in args)
    return step(*args, **{name: swap_caches(value, number) for name, value in kwargs.items()})


def _has_cache(value: Any) -> bool:
    if isinstance(value, LayerCall):
        return any(isinstance(item, Cache) for item in (*value.args, *value.kwargs.values()))
    return isinstance(value, Cache)


# Functions of the module rather than closures: torch.compile knows a layer's code by its function, and one function is
# compiled once for all layers.


def _full(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = within_reading(partial(type(self).forward, self))
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _full_in_fp8(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # torch 2.11 compiles `_full` so that what autograd functions compute is kept, unless it is asked about each operator;
    # later versions ask by themselves
    asked = {"context_fn": _nothing_kept} if torch.compiler.is_compiling() else {}
    forward = within_reading(partial(type(self).forward, self))
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **asked, **kwargs)


def _selective(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(
        within_reading(partial(type(self).forward, self)),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_selective_contexts,
        **kwargs,
    )


_CHECKPOINTED: dict[str, Callable[..., Any]] = {"full": _full, "selective": _selective, "offload": _full}


def _nothing_kept() -> Any:
    return create_selective_checkpoint_contexts(_recompute)


def _recompute(_: Any, __: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    expensive = operator in _KEPT and not (operator is _aten.mm.default and _is_low_rank(*args))
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


def _is_low_rank(left: Tensor, right: Tensor) -> bool:
    """Recognize the second product of an adapter.

    It costs as little as a sum, and is as large as what it is added to.
    """
    return left.shape[1] * _LOW_RANK <= min(left.shape[0], right.shape[1])


#: a rank is low that is so many times smaller than both sides of a product
_LOW_RANK = 8

_aten = torch.ops.aten
_KEPT = frozenset(
    {
        _aten.mm.default,
        _aten._scaled_mm.default,  # in fp8
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.linear.default,
        *OPERATORS,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    }
)
