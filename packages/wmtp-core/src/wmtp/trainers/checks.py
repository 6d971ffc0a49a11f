"""Whether a trainer keeps its contract, asked where a breach would be found late, blamed on somebody else, or never."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wmtp.errors import PluginError
from wmtp.trainers.base import StepView, Trainer

__all__ = ["check_unchanged", "checked_metrics", "checked_modules", "checked_rates", "checked_state", "versions"]

#: names of numbers that the loop puts beside a trainer's, besides those of the loss and ``eval/…``
_OF_THE_LOOP = frozenset({"step", "stage", "epoch", "lr", "tokens", "tokens_per_second", "gradient_norm", "peak_memory_gib"})


def checked_modules(trainer: Trainer, name: str) -> dict[str, nn.Module]:
    """`Trainer.modules`, whose names become those of files at the end of the run.

    Args:
        trainer: the algorithm.
        name: what messages call it.

    Raises:
        PluginError: something else than modules by name, or a name that cannot be a file's.
    """
    modules = trainer.modules()
    if not isinstance(modules, Mapping):
        raise PluginError(f"{name}: modules returned a {type(modules).__name__}, not modules by name")
    for key, module in modules.items():
        if not isinstance(module, nn.Module):
            raise PluginError(f"{name}: modules returned a {type(module).__name__} as {key!r}, not a torch.nn.Module")
        if not isinstance(key, str) or not re.fullmatch(r"\w[\w-]*", key) or key in ("model", "heads"):
            raise PluginError(
                f"{name}: modules returned a module named {key!r}; use letters, digits, '_' and '-', and neither 'model' nor "
                f"'heads', which are the run's own"
            )
    return dict(modules)


def checked_rates(trainer: Trainer, name: str, modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """`Trainer.learning_rates`.

    Args:
        trainer: the algorithm.
        name: what messages call it.
        modules: its modules.

    Raises:
        PluginError: something else than numbers ≥ 0 by the names of modules.
    """
    rates = trainer.learning_rates()
    if not isinstance(rates, Mapping):
        raise PluginError(f"{name}: learning_rates returned a {type(rates).__name__}, not numbers by name")
    for key, rate in rates.items():
        if key not in modules:
            raise PluginError(
                f"{name}: learning_rates names {key!r}, which is none of its modules: {', '.join(modules) or 'none'}"
            )
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise PluginError(f"{name}: learning_rates says {rate!r} for {key!r}; a learning rate is a number ≥ 0")
    return dict(rates)


def checked_metrics(trainer: Trainer, name: str, own: Mapping[str, object]) -> Mapping[str, Tensor | float]:
    """`Trainer.metrics`.

    Args:
        trainer: the algorithm.
        name: what messages call it.
        own: the loop's own metrics, which stay what they are.

    Raises:
        PluginError: something else than numbers by name, or a name of the loop's.
    """
    metrics = trainer.metrics()
    if not isinstance(metrics, Mapping):
        raise PluginError(f"{name}: metrics returned a {type(metrics).__name__}, not numbers by name")
    for key in metrics:
        if not isinstance(key, str):
            raise PluginError(f"{name}: metrics returned a number named {key!r}; a name is text")
        if key in own or key in _OF_THE_LOOP or key.startswith("eval/"):
            raise PluginError(f"{name}: metrics returned {key!r}, which is the loop's own metric; call it something else")
    return metrics


def checked_state(trainer: Trainer, name: str) -> dict[str, Any]:
    """`Trainer.state_dict`, which a checkpoint must be able to give back without running code that stands in it.

    Args:
        trainer: the algorithm.
        name: what messages call it.

    Raises:
        PluginError: something else than tensors and plain values by name.
    """
    state = trainer.state_dict()
    if not isinstance(state, Mapping):
        raise PluginError(f"{name}: state_dict returned a {type(state).__name__}, not values by name")
    for key, value in state.items():
        try:
            saved = io.BytesIO()
            torch.save(value, saved)
            saved.seek(0)
            torch.load(saved, map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle, and of whatever the value does when it is pickled
            raise PluginError(
                f"{name}: state_dict returned a {type(value).__name__} as {key!r} that no checkpoint can give back; keep "
                f"tensors, numbers, text, and lists and dicts of them"
            ) from error
    return dict(state)


def versions(view: StepView) -> dict[str, int]:
    """How often each tensor of a view was changed in place; torch counts that anyway."""
    return {name: tensor._version for name, tensor in _tensors(view)}


def check_unchanged(view: StepView, before: Mapping[str, int], name: str) -> None:
    """Refuse what a trainer has done to the loop's own numbers: losses that are logged, targets, tokens.

    Args:
        view: what the trainer was given.
        before: its `versions` then.
        name: what messages call the trainer.

    Raises:
        PluginError: a tensor has changed.
    """
    for key, version in versions(view).items():
        if version != before[key]:
            raise PluginError(f"{name}: it changed view.{key} in place, which the loop goes on to use; change a clone() of it")


def _tensors(view: StepView) -> Iterator[tuple[str, Tensor]]:
    batch, targets = view.batch, view.targets
    named = {
        "batch.input_ids": batch.input_ids,
        "batch.document": batch.document,
        "batch.position": batch.position,
        "batch.learn": batch.learn,
        "batch.weight": batch.weight,
        "targets.ids": targets.ids,
        "targets.valid": targets.valid,
        "token_loss": view.token_loss,
        "entropy": view.entropy,
    }
    yield from ((key, tensor) for key, tensor in named.items() if tensor is not None)
    yield from ((f"observations[{key!r}]", tensor) for key, tensor in view.observations.items())
