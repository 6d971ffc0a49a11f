"""Rows and graphs of a decoding request, kept for later ones.

They stay on the model, for the next request that they fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from wmtp.generation.base import Sampling
from wmtp.generation.sampling import Draws
from wmtp.generation.step import Step

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["close_step", "open_step", "release"]

#: attribute of a model that holds the rows and graphs of its last requests
_KEPT: Final = "_kept_decoding"

#: requests with and without speculation take turns in a comparison
_MOST_KEPT: Final = 2


def open_step(
    model: MTPModel,
    prompts: Sequence[Sequence[int]],
    most: int,
    *,
    drafts: int,
    sampling: Sampling,
    draws: Draws,
) -> Step:
    """Make rows for some prompts, or reuse those kept.

    Kept are those of the last requests with their graphs, where they fit.

    Args:
        model: in eval mode.
        prompts: token ids; none empty.
        most: the most tokens that a row will have.
        drafts: of a step; 0: no speculation.
        sampling: how tokens are chosen.
        draws: random numbers of the rows.

    Raises:
        ConfigError: this architecture cannot be decoded with a cache.
    """
    kind = _kind(model, len(prompts), drafts, sampling)
    step = _kept(model).pop(kind, None)
    if step is None or step.most < most:
        step = None  # its memory is free before new memory is taken
        step = Step(model, len(prompts), most, kind, drafts=drafts, sampling=sampling)
    step.draws = draws
    return step


def close_step(model: MTPModel, step: Step) -> None:
    """Keep a request's rows and graphs for the next, until `release`."""
    if step.replays and not torch.is_autocast_enabled(
        step.kind[0].type
    ):  # autocast's cached casts of the weights are gone then
        kept = _kept(model)
        kept[step.kind] = step
        while len(kept) > _MOST_KEPT:
            kept.pop(next(iter(kept)))


def release(model: MTPModel) -> None:
    """Free the memory that decoding on a GPU keeps.

    Caches and graphs of steps are kept for later requests.
    """
    model.__dict__.pop(_KEPT, None)


class _Kept(dict["tuple[Any, ...]", "Step"]):
    """Steps by kind, which copies and pickles of a model leave out."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _kept(model: MTPModel) -> _Kept:
    return model.__dict__.setdefault(_KEPT, _Kept())


def _kind(model: MTPModel, rows: int, drafts: int, sampling: Sampling) -> tuple[Any, ...]:
    """Collect what graphs depend on, the addresses of parameters included."""
    device = model.anatomy.output.weight.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    where = tuple(parameter.data_ptr() for parameter in model.parameters()) if device.type == "cuda" else ()
    code = model.compiled_layers, model.block_attention, model.draft_ids
    return device, rows, drafts, sampling.temperature, sampling.top_p, autocast, code, where
