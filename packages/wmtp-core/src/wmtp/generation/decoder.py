"""A model's decoder, run on a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig

from wmtp.errors import ConfigError
from wmtp.generation.cache import RowCache
from wmtp.models.anatomy import LayerCall, evaluating, first_tensor, record_call
from wmtp.models.config_fields import field
from wmtp.models.few_rows import step_code
from wmtp.models.layer_steps import has_known_parts
from wmtp.models.masks import attending_layers, attention_masks, reads_masks
from wmtp.models.step_cache import plain_layers, steps_are_compiled
from wmtp.models.trial import small_windows

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["CachedDecoder", "Read", "open_decoder"]


@frozen(kw_only=True, eq=False)
class Read:
    """Results of reading T tokens of each row.

    Args:
        hidden: ``[B, T, D]``, head 1's hidden states.
        raw: ``[B, T, D]``, the last layer's output, before the final norm.
        trunk: ``[B, T, D]``, the trunk's output.
        call: the arguments that the heads' own layers get, but for hidden states and cache.
        slots: ``[B, T]``, the positions that were read.
        width: slots that attention looked at.
        lengths: where rows begin, their tokens; see `CachedDecoder.read`.
        again: whether drafts were made from this before, when fewer or more of those that were read counted.
    """

    hidden: Tensor
    raw: Tensor
    trunk: Tensor
    call: LayerCall
    slots: Tensor
    width: int
    lengths: Sequence[int] | None
    again: bool = False


#: what architectures and versions of transformers call the cache
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class _Reached(Exception):
    """Signal that the layer was called."""


class CachedDecoder:
    """Runs a decoder over the next tokens of rows of different length.

    Args:
        model: in eval mode.
        capacity: the most tokens that a row will have, drafts included.
    """

    def __init__(self, model: MTPModel, capacity: int) -> None:
        self._model = model
        self._anatomy = model.anatomy
        self.capacity = capacity
        self._config = model.anatomy.decoder.config
        self._dtype = model.anatomy.output.weight.dtype
        self._layer_outputs = 0  # of a tuple that a layer returns; 0: it returns a tensor
        parameters = signature(model.anatomy.decoder.forward).parameters
        self._cache_name = next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[0])
        self._has_attention = reads_masks(self._config)
        self.cache = RowCache(capacity, self._config, layers=attending_layers(self._config))

    def new_cache(self, history: int = 1) -> RowCache:
        """Make a cache for a head's own layer.

        Args:
            history: how many tokens of a prompt it reads again.
        """
        return RowCache(self.capacity, self._config, history)

    def read(self, ids: Tensor, slots: Tensor, start: int | None, width: int, lengths: Sequence[int] | None = None) -> Read:
        """Read tokens and put their keys and values into the cache.

        Args:
            ids: ``[B, T]``.
            slots: ``[B, T]``, their positions, consecutive in each row.
            start: the first position where it is the same in all rows, else None.
            width: more than any of ``slots``.
            lengths: number of tokens of each new row; the rest is padding. None: rows continue.
        """
        self.cache.place(slots, start, width, lengths)

        outputs: list[Tensor] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            self._layer_outputs = len(output) if isinstance(output, tuple) else 0
            outputs.append(first_tensor(output))

        last, called = self._anatomy.layers[-1], self._model.called_layer
        handle = last.register_forward_hook(note)
        try:
            with record_call(called) as calls, record_call(last) as trunk:
                hidden = self._anatomy.decoder(**self._arguments(ids, slots, width)).last_hidden_state
        finally:
            handle.remove()
        read = {"hidden": hidden, "raw": outputs[0], "trunk": trunk[0].hidden_states, "call": calls[0]}
        return Read(**read, slots=slots, width=width, lengths=lengths)

    def with_rows(self, rows: Tensor) -> CachedDecoder:
        """Copy some rows into a decoder of their own."""
        copied = copy(self)
        copied.cache = self.cache.with_rows(rows)
        return copied

    def call_at(self, slots: Tensor, width: int) -> LayerCall:
        """Return the arguments of the heads' own layers at other positions.

        They hold position embeddings, mask and whatever else it takes. The layers before it are skipped, so the hidden states
        among them mean nothing.
        """
        arguments = self._arguments(slots, slots, width)
        if has_known_parts(self._anatomy.decoder):  # no tokens have to be looked up
            del arguments["input_ids"]
            arguments["inputs_embeds"] = slots.new_empty(*slots.shape, self._anatomy.hidden_size, dtype=self._dtype)
        else:
            arguments["input_ids"] = torch.zeros_like(slots)
        called, layers = self._model.called_layer, list(self._anatomy.layers)
        recorded: list[LayerCall] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorded.append(LayerCall(args=args, kwargs=kwargs))
            raise _Reached

        handle = called.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with _skipped(layers[: layers.index(called)], outputs=self._layer_outputs):
                self._anatomy.decoder(**arguments)
        except _Reached:
            pass
        finally:
            handle.remove()
        return recorded[0]

    def read_embedded(
        self, x: Tensor, slots: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor, LayerCall]:
        """Read tokens of which all is known that comes before the layers.

        Args:
            x: ``[B, T, D]``, their embeddings.
            slots: ``[B, T]``, their positions.
            angles: cosines and sines, ``[B, T, d]`` each.
            mask: ``[B, 1, T, W]``.

        Returns:
            the last layer's output and input ``[B, T, D]``, and the arguments that all layers get.
        """
        self.cache.place(slots, None, mask.shape[-1])
        call, trunk = self.layer_call(slots, angles, mask), x
        for layer in self._anatomy.layers:
            trunk, x = x, call.repeat(layer, x)
        return x, trunk, call

    def layer_call(self, slots: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor) -> LayerCall:
        """Return the arguments that Llama's layers get; see `read_embedded`."""
        given = {"attention_mask": mask, "position_embeddings": angles, "position_ids": slots, "use_cache": True}
        return LayerCall(args=(), kwargs=given | {self._cache_name: self.cache})

    def tables(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the angles and the mask of every position.

        Args:
            width: slots that attention looks at.

        Returns:
            cosines and sines ``[C, d]``, and what is added to scores, ``[C, W]``.
        """
        device = self._anatomy.embedding.weight.device
        slots = torch.arange(self.capacity, device=device)[None]
        with plain_layers():
            positions, mask = _places(self._config, slots, width, self._model.max_positions, self._dtype, True)
            angles: Any = self._anatomy.decoder.rotary_emb
            cos, sin = angles(torch.empty(1, dtype=self._dtype, device=device), positions)
        return cos[0].contiguous(), sin[0].contiguous(), _as_numbers(mask, self._dtype)[0, 0].contiguous()

    def with_cache(self, call: LayerCall, cache: RowCache) -> LayerCall:
        """Return the same call with another cache in place of the decoder's."""
        return call.map(lambda value: cache if value is self.cache else value)

    def last_logits_alone(self, ids: Tensor, last: Tensor | None = None) -> Tensor:
        """Compute head 1's logits ``[V]`` after a row ``[S]`` alone.

        Neither other rows nor a cache take part.

        Args:
            ids: the row.
            last: ``[1]``, the place of its last token, where it is padded on the right; the device alone knows it.
        """
        if last is None:
            hidden = self._anatomy.decoder(input_ids=ids[None], use_cache=False).last_hidden_state
            return self._model.unembedding(1).logits(hidden[0, -1])
        slots = torch.arange(len(ids), device=ids.device)[None]
        arguments = self._arguments(ids[None], slots, len(ids)) | {"use_cache": False}
        del arguments[self._cache_name]
        hidden = self._anatomy.decoder(**arguments).last_hidden_state
        return self._model.unembedding(1).logits(hidden[0, last])[0]

    def _arguments(self, ids: Tensor, slots: Tensor, width: int) -> dict[str, Any]:
        compiled = self._model.compiled_layers and steps_are_compiled() and has_known_parts(self._anatomy.decoder)
        positions, mask = step_code(_places, compiled=compiled)(
            self._config, slots, width, self._model.max_positions, self._dtype, self._has_attention
        )
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": mask,
            self._cache_name: self.cache,
            "use_cache": True,
        }


def open_decoder(model: MTPModel, longest: int, capacity: int) -> CachedDecoder:
    """Make a decoder, after testing that it decodes in pieces correctly.

    Args:
        model: in eval mode.
        longest: the most tokens that a row will have.
        capacity: the same with drafts that go beyond the end.

    Raises:
        ConfigError: this architecture cannot be decoded so; the message says why.
    """
    name = type(model.base).__name__
    kernel = getattr(model.base.config, "_attn_implementation", "eager")
    if kernel not in ("sdpa", "eager") and not model.block_attention:
        raise ConfigError(f"{name} with the attention kernel '{kernel}' cannot be decoded here; load it with sdpa or eager")
    window = field(model.base.config, "window_size")
    if "local" in field(model.base.config, "attention_layers", ()) and longest > window:
        raise ConfigError(
            f"{name} has windows of {window} tokens that cannot be told apart from rows of different length: prompt and new "
            f"tokens would be up to {longest}; ask for less"
        )
    if not model.__dict__.get("_decodes_in_pieces"):
        _try_out(model, name)
        model.__dict__["_decodes_in_pieces"] = True
    return CachedDecoder(model, capacity)


def _try_out(model: MTPModel, name: str) -> None:
    """Compare reading two rows at once with reading them in pieces.

    The second row is read as if drafts had been rejected.
    """
    embedding = model.anatomy.embedding
    device = embedding.weight.device
    ids = (torch.arange(14, device=device) * 7919 + 3).remainder(embedding.num_embeddings).view(2, 7)
    slots = torch.arange(4, device=device).expand(2, 4)
    later = slots[:, :3] + torch.tensor([[4], [2]], device=device)
    again = later[:, 1:]
    last = again[:, 1:]  # some architectures treat a single token in their own way
    decoder = model.anatomy.decoder
    with evaluating(decoder), small_windows(decoder), plain_layers():
        whole = decoder(input_ids=ids, use_cache=False).last_hidden_state
        in_pieces = CachedDecoder(model, 8)
        try:
            first = in_pieces.read(ids[:, :4], slots, 0, 4, lengths=(4, 2)).hidden
            second = in_pieces.read(ids.gather(1, later), later, None, 7).hidden
            third = in_pieces.read(ids.gather(1, again), again, None, 7).hidden
            fourth = in_pieces.read(ids.gather(1, last), last, None, 7).hidden
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{name} cannot be decoded here: its own cache holds something that cannot be kept row by row "
                f"({type(error).__name__}: {reason}); its folder can be decoded by transformers"
            ) from error

    def compared(parts: list[Tensor]) -> Tensor:
        return torch.cat([parts[0][0], parts[0][1, :2], *(row for part in parts[1:] for row in part)])

    found = compared([first, second, third, fourth])
    wanted = compared(
        [whole.gather(1, places[..., None].expand(-1, -1, whole.shape[-1])) for places in (slots, later, again, last)]
    )
    tolerance = 1e-3 if whole.dtype in (torch.float32, torch.float64) else 0.1
    if found.shape != wanted.shape or not (found - wanted).abs().max() <= tolerance * wanted.abs().max():
        raise ConfigError(f"{name} gives another result when it reads a text in pieces; it cannot be decoded with a cache")


def _places(
    config: PreTrainedConfig, slots: Tensor, width: int, longest: int | None, dtype: torch.dtype, has_attention: bool
) -> tuple[Tensor, Any]:
    """Return a decoder's positions and masks for ``[B, T]`` slots."""
    # a draft may lie beyond the last position that the model has; nothing reads what comes of it
    positions = slots if longest is None else slots.clamp(max=longest - 1)
    if not has_attention:
        return positions, None
    seen = torch.arange(width, device=slots.device).expand(len(slots), width)
    mask = attention_masks(config, slots, seen, None, dtype)
    if slots.device.type == "cuda":  # the kernel adds it to its scores: every layer would turn it into numbers again
        mask = tree_map_only(Tensor, partial(_as_numbers, dtype=dtype), mask)
    return positions, mask


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), -torch.inf)


@contextmanager
def _skipped(layers: list[nn.Module], *, outputs: int) -> Iterator[None]:
    """Make the layers return their input, inside the context.

    Args:
        layers: that are skipped.
        outputs: length of the tuple that each returns; 0: no tuple.
    """

    def skip(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *[None] * (outputs - 1)) if outputs else hidden

    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = skip  # an attribute of the instance hides the method of the class
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own
