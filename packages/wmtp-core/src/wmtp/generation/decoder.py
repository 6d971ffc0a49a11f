"""A model's decoder, run on a few tokens at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from wmtp.errors import ConfigError
from wmtp.generation.cache import RowCache
from wmtp.models.anatomy import LayerCall, evaluating, record_call
from wmtp.models.config_fields import field

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["CachedDecoder", "Read", "open_decoder"]


@frozen(kw_only=True, eq=False)
class Read:
    """What reading T tokens of each row gave.

    Args:
        hidden: ``[B, T, D]``, head 1's hidden states.
        call: the arguments of the last layer; its hidden states are the trunk's output ``[B, T, D]``.
        slots: ``[B, T]``, the positions that were read.
        width: slots that attention looked at.
    """

    hidden: Tensor
    call: LayerCall
    slots: Tensor
    width: int


class _Reached(Exception):
    """The last layer was called."""


class CachedDecoder:
    """Runs a decoder over the next tokens of rows of different length.

    Args:
        model: in eval mode.
        capacity: the most tokens that a row will have, drafts included.
    """

    def __init__(self, model: MTPModel, capacity: int) -> None:
        self._model = model
        self._anatomy = model.anatomy
        self._capacity = capacity
        self._kernel = getattr(model.base.config, "_attn_implementation", "eager")
        self._dtype = model.anatomy.output.weight.dtype
        self._layers_return_tuples = False
        self.cache = RowCache(capacity)
        # renamed in transformers 5.24; the old name is removed in 5.40
        accepted = inspect.signature(self._anatomy.decoder.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"

    def new_cache(self) -> RowCache:
        """A cache for a head's own layer."""
        return RowCache(self._capacity)

    def read(self, ids: Tensor, slots: Tensor, start: int | None, width: int) -> Read:
        """Read tokens and put their keys and values into the cache.

        Args:
            ids: ``[B, T]``.
            slots: ``[B, T]``, their positions, consecutive in each row.
            start: the first position where it is the same in all rows, else None.
            width: more than any of ``slots``.
        """
        self.cache.place(slots, start, width)

        def note(_: nn.Module, __: Any, output: Any) -> None:
            self._layers_return_tuples = isinstance(output, tuple)

        handle = self._anatomy.layers[-1].register_forward_hook(note)
        try:
            with record_call(self._anatomy.layers[-1]) as calls:
                hidden = self._anatomy.decoder(**self._arguments(ids, slots, width)).last_hidden_state
        finally:
            handle.remove()
        return Read(hidden=hidden, call=calls[0], slots=slots, width=width)

    def call_at(self, slots: Tensor, width: int) -> LayerCall:
        """The arguments that the last layer would get at other positions: position embeddings, mask and what else it wants.

        The layers before it are skipped, so the hidden states in it mean nothing.
        """
        ids = torch.zeros_like(slots)
        last = self._anatomy.layers[-1]
        recorded: list[LayerCall] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorded.append(LayerCall(args=args, kwargs=kwargs))
            raise _Reached

        handle = last.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with _skipped(list(self._anatomy.layers)[:-1], as_tuples=self._layers_return_tuples):
                self._anatomy.decoder(**self._arguments(ids, slots, width))
        except _Reached:
            pass
        finally:
            handle.remove()
        return recorded[0]

    def with_cache(self, call: LayerCall, cache: RowCache) -> LayerCall:
        """The same call, with another cache in place of the decoder's."""

        def swap(value: Any) -> Any:
            return cache if value is self.cache else value

        return evolve(
            call,
            args=tuple(swap(value) for value in call.args),
            kwargs={name: swap(value) for name, value in call.kwargs.items()},
        )

    def last_logits_alone(self, ids: Tensor) -> Tensor:
        """Head 1's logits ``[V]`` after a row ``[S]``, computed for this row alone and without a cache."""
        hidden = self._anatomy.decoder(input_ids=ids[None], use_cache=False).last_hidden_state
        return self._model.unembedding(1).logits(hidden[0, -1])

    def _arguments(self, ids: Tensor, slots: Tensor, width: int) -> dict[str, Any]:
        seen = torch.arange(width, device=ids.device) <= slots[..., None]
        mask = seen[:, None]
        if self._kernel != "sdpa":  # eager attention adds the mask to its scores
            lowest = torch.finfo(self._dtype).min
            mask = torch.where(mask, 0.0, lowest).to(self._dtype)
        longest = self._model.max_positions
        return {
            "input_ids": ids,
            # a draft may lie beyond the last position that the model has; nothing reads what comes of it
            "position_ids": slots if longest is None else slots.clamp(max=longest - 1),
            "attention_mask": mask,
            self._cache_name: self.cache,
            "use_cache": True,
        }


def open_decoder(model: MTPModel, longest: int, capacity: int) -> CachedDecoder:
    """A decoder of ``model``, which is known to decode in pieces as it does at once.

    Args:
        model: in eval mode.
        longest: the most tokens that a row will have.
        capacity: the same with drafts that go beyond the end.

    Raises:
        ConfigError: this architecture cannot be decoded so; the message says why.
    """
    name = type(model.base).__name__
    kernel = getattr(model.base.config, "_attn_implementation", "eager")
    if kernel not in ("sdpa", "eager"):
        raise ConfigError(f"{name} with the attention kernel '{kernel}' cannot be decoded here; load it with sdpa or eager")
    window, kinds = field(model.base.config, "sliding_window"), field(model.base.config, "layer_types")
    slides = field(model.base.config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    if window and slides and longest > window:
        raise ConfigError(
            f"{name} attends to the last {window} tokens only, which is not supported beyond that length: prompt and new "
            f"tokens would be up to {longest}; ask for less"
        )
    if not model.__dict__.get("_decodes_in_pieces"):
        _try_out(model, name)
        model.__dict__["_decodes_in_pieces"] = True
    return CachedDecoder(model, capacity)


def _try_out(model: MTPModel, name: str) -> None:
    """Read two rows at once and in pieces, the second row as if drafts had been rejected, and compare."""
    embedding = model.anatomy.embedding
    device = embedding.weight.device
    ids = (torch.arange(14, device=device) * 7919 + 3).remainder(embedding.num_embeddings).view(2, 7)
    slots = torch.arange(4, device=device).expand(2, 4)
    later = slots[:, :3] + torch.tensor([[4], [2]], device=device)
    with evaluating(model.anatomy.decoder):
        whole = model.anatomy.decoder(input_ids=ids, use_cache=False).last_hidden_state
        decoder = CachedDecoder(model, 8)
        try:
            first = decoder.read(ids[:, :4], slots, 0, 4).hidden
            second = decoder.read(ids.gather(1, later), later, None, 7).hidden
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError) as error:
            raise ConfigError(
                f"{name} cannot be decoded with a cache of keys and values ({type(error).__name__}: {error})"
            ) from error
    pieces, places = torch.cat([first, second], dim=1), torch.cat([slots, later], dim=1)
    expected = whole.gather(1, places[..., None].expand(-1, -1, whole.shape[-1]))
    tolerance = 1e-3 if whole.dtype in (torch.float32, torch.float64) else 0.1
    if (pieces - expected).abs().max() > tolerance * expected.abs().max():
        raise ConfigError(f"{name} gives another result when it reads a text in pieces; it cannot be decoded with a cache")


@contextmanager
def _skipped(layers: list[nn.Module], *, as_tuples: bool) -> Iterator[None]:
    """The layers give back what they are given inside."""

    def skip(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if as_tuples else hidden

    for layer in layers:
        layer.forward = skip  # an attribute of the instance hides the method of the class
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
