"""Discovery of a model's parts (layers, norm, unembedding) by running it once.

Nothing here knows an architecture by name. What is found is checked: put together again, the parts must give the model's
own logits bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from wmtp.errors import ConfigError, described
from wmtp.loss import Unembedding
from wmtp.models.config_fields import field, layer_count
from wmtp.models.unembedding import SCALE_NAMES, SOFTCAP_NAMES, called_between, find_transform

__all__ = [
    "Anatomy",
    "LayerCall",
    "Unembedding",
    "dissect",
    "eval_mode",
    "evaluating",
    "find_layers",
    "first_tensor",
    "record_call",
    "record_output",
]


@frozen(kw_only=True, eq=False)
class LayerCall:
    """Recorded arguments of one call of a decoder layer.

    They hold hidden states, mask, positions, and whatever else the architecture passes.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden_states(self) -> Tensor:
        """Input of the layer, ``[B, S, D]``."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def repeat(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """Call ``layer`` with other hidden states and otherwise the same arguments."""
        if self.args:
            return first_tensor(layer(hidden_states, *self.args[1:], **self.kwargs))
        return first_tensor(layer(**{**self.kwargs, "hidden_states": hidden_states}))

    def map(self, change: Callable[[Any], Any]) -> LayerCall:
        """Return the call with every argument changed."""
        return LayerCall(
            args=tuple(map(change, self.args)), kwargs={name: change(value) for name, value in self.kwargs.items()}
        )


@frozen(kw_only=True, eq=False)
class Anatomy:
    """Parts of a decoder-only model on which heads are put.

    Args:
        decoder: from token ids to the last hidden state, without the unembedding.
        embedding: from token ids to the decoder's input.
        output: the unembedding's weight ``[V, D]``, and a bias where it has one.
        layers: the decoder layers.
        tail: the modules called after the last layer, in order: for nearly all models one norm.
        scale, softcap, divides, float32: of the logits; see `Unembedding`.
    """

    decoder: PreTrainedModel
    embedding: nn.Embedding
    output: nn.Linear
    layers: nn.ModuleList
    tail: tuple[nn.Module, ...]
    scale: float = 1.0
    softcap: float | None = None
    divides: bool = False
    float32: bool = False

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.output.in_features

    def unembedding(self, weight: Tensor, bias: Tensor | None) -> Unembedding:
        """An unembedding with this model's scale and cap."""
        return Unembedding(
            weight=weight, bias=bias, scale=self.scale, softcap=self.softcap, divides=self.divides, float32=self.float32
        )


def first_tensor(output: Any) -> Tensor:
    """Return the hidden states of a layer's output.

    Some layers return a tensor, some a tuple that begins with it.
    """
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients, inside the context."""
    with eval_mode(model), torch.no_grad():
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, inside the context.

    Afterwards every submodule is in the mode in which it was.
    """
    modes = [(module, module.training) for module in model.modules()]
    # a module's attribute takes long to set: of a model of 30 layers, longer than reading a prompt
    if any(mode for _, mode in modes):
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def record_call(layer: nn.Module) -> Iterator[list[LayerCall]]:
    """Record the calls of ``layer`` inside the context, in order."""
    calls: list[LayerCall] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(LayerCall(args=args, kwargs=kwargs))

    # first in line: FSDP's own hook, which may cast the arguments, acts on each head again
    handle = layer.register_forward_pre_hook(record, with_kwargs=True, prepend=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def record_output(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the hidden states that ``layer`` returns inside, in order."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(first_tensor(output)))
    try:
        yield outputs
    finally:
        handle.remove()


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find the parts of ``model``.

    The model, its training mode and the random state stay as they are.

    Raises:
        ConfigError: it is not a decoder-only language model, or of a shape that is not understood.
    """
    name = type(model).__name__

    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"models.base: {name} cannot get multi-token heads: {reason}. docs/models.md says what can")

    if getattr(model.config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder; a decoder-only causal language model is needed")
    decoder = cast(PreTrainedModel, model.base_model)
    if decoder is model:  # the prefix is what a multimodal model calls this one (Llama 4)
        decoder = cast(PreTrainedModel, getattr(model, "model", model))
    if decoder is model:
        raise refuse(f"no decoder was found at its attribute '{model.base_model_prefix}'")
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise refuse("it has no token embedding (get_input_embeddings() gives none)")
    if not isinstance(output, nn.Linear):
        raise refuse("it has no unembedding (get_output_embeddings() gives no linear layer)")
    layers = find_layers(model, decoder, refuse)

    # fixed ids rather than random ones: the caller's random state must not change
    ids = (torch.arange(6, device=model.device) * 7919 + 1).remainder(embedding.num_embeddings).unsqueeze(0)
    with evaluating(model):
        try:
            expected = model(input_ids=ids, use_cache=False).logits
            if expected.isnan().any():
                raise refuse("its logits are NaN: its file is damaged, or its numbers are too large for this precision")
            if not _is_causal(model, ids, expected, embedding.num_embeddings):
                raise refuse(_looks_ahead(model))
            tail, hidden = _find_tail(decoder, layers, ids, refuse)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
            raise refuse(f"a trial run on {ids.shape[1]} tokens failed: {described(error)}") from error
        if hidden.shape[-1] != field(model.config, "hidden_size", hidden.shape[-1]):
            raise refuse(f"its last hidden state is {hidden.shape[-1]} wide, and its layers are not")
        if hidden.dtype != output.weight.dtype:  # residual_in_fp32 of Mamba
            raise refuse(
                f"its last hidden state stays {hidden.dtype}, and its unembedding is {output.weight.dtype}; open it in fp32 "
                '(--precision fp32; for training devices.precision = "fp32" or "bf16")'
            )
        logits = F.linear(hidden, output.weight, output.bias)
        found = find_transform(model, logits, expected)
        between = [] if found is not None else called_between(model, decoder, output, ids)
    if between:
        raise refuse(
            f"between its last hidden state and its unembedding it has {', '.join(between)}, "
            "which each head would need of its own"
        )
    if found is None:
        raise refuse(
            "its logits are not, bit for bit, those of its last hidden state times its unembedding, with or without a factor "
            f"of the logits ({', '.join(SCALE_NAMES)}) and a cap ({', '.join(SOFTCAP_NAMES)}) from its config; a factor "
            "of the hidden state rounds otherwise"
        )
    return Anatomy(decoder=decoder, embedding=embedding, output=output, layers=layers, tail=tail, **found)


def find_layers(model: PreTrainedModel, decoder: nn.Module, refuse: Callable[[str], ConfigError]) -> nn.ModuleList:
    """Find the decoder layers.

    Args:
        model: may be on the meta device.
        decoder: its part from token ids to the last hidden state.
        refuse: makes an error of a reason.

    Raises:
        ConfigError: there is no list of them, or several could be it.
    """
    count = layer_count(model.config)
    # a layer of LongCat-Flash has two attentions, and counts as two hidden layers
    counts = {count, field(model.config, "num_layers", count)}
    lists = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) in counts}
    if not lists:
        raise refuse(f"no list of {count} decoder layers (num_hidden_layers) was found in {type(decoder).__name__}")
    # with one layer, lists inside the layer can have that length too: the decoder's own is the outermost
    depth = min(n.count(".") for n in lists)
    outermost = {n: m for n, m in lists.items() if n.count(".") == depth}
    if len(outermost) > 1:
        raise refuse(f"several lists could be its decoder layers: {', '.join(outermost)}")
    return next(iter(outermost.values()))


def _is_causal(model: PreTrainedModel, ids: Tensor, expected: Tensor, vocab_size: int) -> bool:
    """Change the last token, and look whether the logits before it change."""
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % vocab_size
    logits = model(input_ids=other, use_cache=False).logits[:, :-1].float()
    before = expected[:, :-1].float()
    return float((logits - before).abs().max()) <= 1e-3 * float(before.abs().max())


def _looks_ahead(model: PreTrainedModel) -> str:
    reason = "a token sees those after it, so that it would learn to copy what it shall predict"
    if getattr(model.config, "is_decoder", None) is False:
        return f"{reason}: it is an encoder (is_decoder = false in its config.json); use a decoder-only model"
    return f"{reason}; use a decoder-only model"


def _find_tail(
    decoder: nn.Module, layers: nn.ModuleList, ids: Tensor, refuse: Callable[[str], ConfigError]
) -> tuple[tuple[nn.Module, ...], Tensor]:
    """Find the modules after the last layer, and the last hidden state.

    Returns:
        the modules, in order, and the state ``[1, S, D]``.
    """
    last = layers[-1]
    called: list[nn.Module] = []
    tail: list[nn.Module] = []
    output: list[Tensor] = []
    inside: list[nn.Module] = []  # the tail module that runs now: its own children are not part of the tail

    def before(module: nn.Module, _: Any) -> None:
        if output and not inside:
            inside.append(module)
            tail.append(module)

    def after(module: nn.Module, _: Any, result: Any) -> None:
        if inside and inside[0] is module:
            inside.clear()
        if any(module is layer for layer in layers):
            called.append(module)
        if module is last:
            output.append(first_tensor(result))

    containers = {id(module) for module in decoder.modules() if any(child is last for child in module.modules())} - {id(last)}
    handles = []
    try:
        for module in decoder.modules():
            if id(module) not in containers:
                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        with record_call(last) as calls:
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()

    if len(called) != len(layers) or any(a is not b for a, b in zip(called, layers, strict=True)):
        raise refuse(f"its {len(layers)} decoder layers are not run once each, in order")
    again = calls[0].repeat(last, calls[0].hidden_states)
    if not torch.equal(again, output[0]):
        raise refuse("its last decoder layer, called again with the same arguments, gives another result")
    if output[0].dim() > 3:
        raise refuse(
            f"its layers pass on {output[0].shape[0]} streams of hidden states at once (shape "
            f"{' × '.join(map(str, output[0].shape))}), and a head continues one"
        )
    for module in tail:
        try:
            again = first_tensor(module(again))
        except TypeError as error:
            raise refuse(
                f"{type(module).__name__}, behind its last layer, takes more than that layer's hidden states, which is all "
                "that a head has"
            ) from error
    if again.numel() != hidden.numel() or not torch.equal(again.view_as(hidden), hidden):
        steps = ", ".join(type(module).__name__ for module in tail) or "nothing"
        raise refuse(f"its last hidden state is not that of its last layer followed by {steps}")
    return tuple(tail), hidden
