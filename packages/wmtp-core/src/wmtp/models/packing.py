"""Trial of the ways to separate documents in a packed row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from wmtp.errors import described
from wmtp.models.anatomy import Anatomy, LayerCall, evaluating
from wmtp.models.documents import DocumentRows, by_document, reading, undo_by_document
from wmtp.models.masks import attention_masks
from wmtp.models.trial import chooses_tokens, small_windows

__all__ = ["Packing", "find_packing"]

#: tokens of the trial's two documents
_FIRST, _SECOND, _LONG = 4, 5, 24


@frozen(kw_only=True)
class Packing:
    """A way to run rows of several documents.

    Args:
        problem: why they cannot be; None where they can.
        masks: whether attention is given its mask. An architecture that makes its own of positions is given none.
        mixers: parts of a decoder layer that keep a state, by their name in the layer and their class; they run over each
            document by itself.
    """

    problem: str | None = None
    masks: bool = False
    mixers: tuple[tuple[str, str], ...] = ()

    def arguments(self, anatomy: Anatomy, position_ids: Tensor) -> dict[str, Any]:
        """Return what the decoder is given besides token ids.

        Args:
            anatomy: of the model.
            position_ids: ``[B, S]``, counted from 0 in each document.
        """
        if not self.masks:
            return {"position_ids": position_ids}
        document = (position_ids == 0).cumsum(dim=1)
        same = document[:, :, None] == document[:, None, :]
        masks = attention_masks(anatomy.decoder.config, position_ids, position_ids, same, anatomy.output.weight.dtype)
        return {"position_ids": position_ids, "attention_mask": masks}

    def documents(self, position_ids: Tensor) -> DocumentRows | None:
        """Return the documents that stateful layers go by; None without any."""
        return DocumentRows.of(position_ids) if self.mixers else None

    def prepare(self, layers: Iterable[nn.Module]) -> None:
        """Have the stateful parts of decoder layers go by documents.

        They do whenever they are given any.
        """
        for module in self.find_mixers(layers):
            by_document(module)

    def find_mixers(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Return the parts of decoder layers that keep a state."""
        for layer in layers:
            parts = dict(layer.named_modules())
            for name, kind in self.mixers:
                if name in parts and type(parts[name]).__name__ == kind:
                    yield parts[name]


def find_packing(anatomy: Anatomy) -> Packing:
    """Find how two documents can share a row, separated by restarting positions.

    Tried on a row of a few tokens: another first document must leave the second one's hidden states as they are, and the
    second one must come out as it does alone. First with positions alone, then with masks for attention; parts of layers that
    leak even so are run over each document by itself.
    """
    with evaluating(anatomy.decoder), small_windows(anatomy.decoder):
        first: Packing | None = None
        for masks in (False, True):
            found = _try(anatomy, Packing(masks=masks))
            if found.problem is None:
                return found
            first = first or found
        for masks in (False, True):
            mixers = _leaking_parts(anatomy, Packing(masks=masks))
            if not mixers:
                continue
            with _prepared(anatomy, Packing(masks=masks, mixers=mixers)) as packing:
                found = _try(anatomy, packing)
            if found.problem is None:
                return found
    assert first is not None, "packing was tried at least once"
    return first


@contextmanager
def _prepared(anatomy: Anatomy, packing: Packing) -> Iterator[Packing]:
    packing.prepare(anatomy.layers)
    try:
        yield packing
    finally:
        for module in packing.find_mixers(anatomy.layers):
            undo_by_document(module)


def _ids(anatomy: Anatomy, start: int, count: int) -> Tensor:
    places = torch.arange(start, start + count, device=anatomy.output.weight.device)
    return (places * 7919).remainder(anatomy.embedding.num_embeddings).unsqueeze(0)


def _second(anatomy: Anatomy) -> int:
    """Choose the second document's length.

    Where layers choose tokens it is so long that each has many to choose from.
    """
    return _LONG if chooses_tokens(anatomy.decoder) else _SECOND


def _positions(anatomy: Anatomy) -> Tensor:
    return torch.cat([torch.arange(_FIRST), torch.arange(_second(anatomy))]).to(anatomy.output.weight.device).unsqueeze(0)


def _run(anatomy: Anatomy, packing: Packing, ids: Tensor, positions: Tensor) -> Tensor:
    with reading(packing.documents(positions)):
        arguments = packing.arguments(anatomy, positions)
        return anatomy.decoder(input_ids=ids, use_cache=False, **arguments).last_hidden_state[:, -_second(anatomy) :].float()


def _try(anatomy: Anatomy, packing: Packing) -> Packing:
    """Return ``packing`` where it works, else with the problem."""
    name = type(anatomy.decoder).__name__
    document, positions = _ids(anatomy, 1, _second(anatomy)), _positions(anatomy)
    try:
        one = _run(anatomy, packing, torch.cat([_ids(anatomy, 11, _FIRST), document], dim=1), positions)
        other = _run(anatomy, packing, torch.cat([_ids(anatomy, 23, _FIRST), document], dim=1), positions)
        alone = _run(anatomy, Packing(), document, positions[:, -_second(anatomy) :])
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        reason = described(error)
        return Packing(problem=f"{name} takes no position_ids that begin again inside a row ({reason})")
    size = alone.abs().max()
    if (one - other).abs().max() > _rounding(anatomy) * size:
        return Packing(problem=f"in {name} a document sees the one before it in the same row")
    if (one - alone).abs().max() > (1e-3 if anatomy.output.weight.dtype == torch.float32 else 0.1) * size:
        return Packing(problem=f"in {name} a document comes out differently in a row of several than alone")
    return packing


def _rounding(anatomy: Anatomy) -> float:
    """Largest relative difference between hidden states that see the same.

    A leak may be small, and masked places add exactly nothing. But which rows an expert gets depends on the other document too,
    and products of another number of rows round otherwise: in fp32 that grows with depth and width (measured with Qwen3-Next
    of 4 and 8 layers, 128 and 1,024 wide: a quarter of this).
    """
    if anatomy.output.weight.dtype != torch.float32:
        return 1e-6
    return max(1e-6, 2**-24 * math.sqrt(len(anatomy.layers) * anatomy.hidden_size))


def _leaking_parts(anatomy: Anatomy, packing: Packing) -> tuple[tuple[str, str], ...]:
    """Find the parts of decoder layers that leak between documents.

    The outermost ones, in which a document changes the one after it.
    """
    ids = torch.cat([_ids(anatomy, 11, _FIRST), _ids(anatomy, 1, _second(anatomy))], dim=1)
    calls: dict[nn.Module, LayerCall] = {}
    handles = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = LayerCall(args=args, kwargs=kwargs)

    parts = [(name, module) for layer in anatomy.layers for name, module in layer.named_modules() if name]
    try:
        handles += [module.register_forward_pre_hook(keep, with_kwargs=True) for _, module in parts]
        _run(anatomy, packing, ids, _positions(anatomy))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        return ()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[tuple[str, str], None] = {}
    leaking: list[nn.Module] = []
    for name, module in parts:
        if (
            module in calls
            and not any(module in outer.modules() for outer in leaking)
            and _leaks(module, calls[module], ids.shape[1], _rounding(anatomy))
        ):
            leaking.append(module)
            found[name, type(module).__name__] = None
    return tuple(found)


def _leaks(module: nn.Module, call: LayerCall, length: int, rounding: float) -> bool:
    """Call ``module`` again with another first document; the row has ``length`` tokens."""

    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 3 or value.shape[:2] != (1, length):
            return value
        return torch.cat([value[:, :_FIRST].flip(1) * 1.5 + 0.1, value[:, _FIRST:]], dim=1)

    try:
        before, after = (_first_output(module(*each.args, **each.kwargs)) for each in (call, call.map(changed)))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
        return False
    if before is None or after is None or before.ndim != 3 or before.shape[1] != length:
        return False
    before, after = before[:, _FIRST:].float(), after[:, _FIRST:].float()
    return bool((after - before).abs().max() > rounding * before.abs().max())


def _first_output(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None
