"""Ask a trainer in a step, and validate what it returns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from attrs.exceptions import FrozenInstanceError
from torch import Tensor

from wmtp.data.batch import Targets, shift_to_predictions
from wmtp.errors import PluginError
from wmtp.trainers.base import HiddenView, NotComputed, StepView, Trainer

__all__ = [
    "asked",
    "auxiliary_losses",
    "check_reached",
    "check_unchanged",
    "checked_metrics",
    "eligible",
    "given_weights",
    "observed",
    "place_weights",
    "token_details",
    "versions",
]

#: names of numbers that the loop puts beside a trainer's, besides those of the loss and ``eval/…``
_OF_THE_LOOP = frozenset({"step", "stage", "epoch", "lr", "tokens", "tokens_per_second", "gradient_norm", "peak_memory_gib"})


def asked(trainer: Trainer, method: str, name: str, *arguments: object) -> Any:
    """Call a method of a trainer in a step.

    Args:
        trainer: the algorithm.
        method: its method's name.
        name: what messages call the trainer.
        arguments: of the method.

    Raises:
        PluginError: the method reads what its class has not asked for, keeps state in a frozen object, or switches gradients
            off for what follows.
    """
    cls, computes_gradients = type(trainer).__name__, torch.is_grad_enabled()
    try:
        found = getattr(trainer, method)(*arguments)
    except NotComputed as error:
        raise PluginError(
            f"{name}: {cls}.{method} reads view.{error.name}, which is not computed; write {error.flag} = True in {cls}"
        ) from error
    except FrozenInstanceError as error:
        raise PluginError(
            f"{name}: {cls}.{method} sets an attribute of a frozen object ({', '.join(map(str, error.args))}); a trainer with "
            f"state has a class of its own, which the build() of its wmtp.TrainerConfig makes; views stay as they are"
        ) from error
    if torch.is_grad_enabled() is not computes_gradients:
        raise PluginError(
            f"{name}: {cls}.{method} leaves gradients switched {'off' if computes_gradients else 'on'} for the whole process; "
            "write `with torch.no_grad():` around its own computations"
        )
    return found


def given_weights(trainer: Trainer, view: StepView, name: str) -> tuple[Tensor, Tensor]:
    """Ask for the weights of a step.

    Args:
        trainer: the algorithm.
        view: the step.
        name: what messages call the trainer.

    Returns:
        what `Trainer.token_weights` returned, and the same placed at predictions, ``[B, S, H]`` fp32, 0 where not valid.

    Raises:
        PluginError: not a tensor, without numbers, of another shape, not of floating point, or carrying a gradient.
    """
    given = asked(trainer, "token_weights", name, view)
    return given, place_weights(given, view.targets, f"{name}: {type(trainer).__name__}")


def eligible(trainer: Trainer, view: StepView, name: str) -> Tensor:
    """Ask which predictions the trainer may learn.

    Arguments and errors: see `given_weights`.

    Returns:
        ``[B, S, H]`` bool, no more than are valid.
    """
    chosen, valid = asked(trainer, "eligible", name, view), view.targets.valid
    if chosen is None:
        return valid
    if not isinstance(chosen, Tensor) or chosen.shape != valid.shape or chosen.dtype != torch.bool:
        found = f"{chosen.dtype} of shape {list(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise PluginError(f"{name}: eligible returned {found}; it must be bool, [B, S, H] = {list(valid.shape)}, or None")
    return valid & chosen


def place_weights(weights: object, targets: Targets, trainer: str) -> Tensor:
    """Bring what `Trainer.token_weights` returned to one weight a prediction.

    Args:
        weights: ``[B, S]`` or ``[B, S, H]``.
        targets: ``[B, S, H]``.
        trainer: what messages call the trainer: its type, distribution and version, and its class.

    Returns:
        ``[B, S, H]`` fp32, 0 where not valid.

    Raises:
        PluginError: not a tensor, of another shape, not of floating point, or carrying a gradient.
    """
    valid = targets.valid
    if weights is None:
        raise PluginError(
            f"{trainer}.token_weights returned None; write return before its result, or for a weight of 1 everywhere "
            f"return view.uniform()"
        )
    if not isinstance(weights, Tensor):
        raise PluginError(f"{trainer}.token_weights returned a {type(weights).__name__}, not a tensor")
    if weights.layout != torch.strided:
        raise PluginError(f"{trainer}.token_weights returned a {weights.layout} tensor; weights are dense: use to_dense()")
    if weights.is_meta and not valid.is_meta:
        raise PluginError(f"{trainer}.token_weights returned a tensor on the meta device, which holds no numbers")
    if weights.requires_grad:
        raise PluginError(
            f"{trainer}.token_weights returned weights that carry a gradient; detach them, or the model learns to change its "
            f"weights instead of its predictions"
        )
    if not weights.is_floating_point():
        raise PluginError(f"{trainer}.token_weights returned {weights.dtype}; weights are floating-point numbers")
    rows, length, horizon = valid.shape
    if weights.shape == (rows, length):
        weights = shift_to_predictions(weights, horizon)
    elif weights.shape != (rows, length, horizon):
        raise PluginError(
            f"{trainer}.token_weights returned shape {list(weights.shape)}; it must be [B, S] = {[rows, length]} "
            f"or [B, S, H] = {[rows, length, horizon]}"
        )
    return torch.where(valid, weights.to(device=valid.device, dtype=torch.float32), 0.0)


def observed(trainer: Trainer, view: HiddenView, name: str) -> dict[str, Tensor]:
    """Ask `Trainer.observe`. Arguments and errors: see `given_weights`."""
    before = versions(view)
    found = asked(trainer, "observe", name, view)
    check_unchanged(view, before, name)
    return _token_tensors("observe", found, view.targets, name)


def token_details(trainer: Trainer, view: StepView, name: str) -> dict[str, Tensor]:
    """Ask `Trainer.token_details`. Arguments and errors: see `given_weights`."""
    return _token_tensors("token_details", asked(trainer, "token_details", name, view), view.targets, name)


def auxiliary_losses(trainer: Trainer, view: StepView, name: str) -> dict[str, Tensor]:
    """Ask `Trainer.auxiliary_losses`. Arguments and errors: see `given_weights`."""
    terms = _named_tensors("auxiliary_losses", asked(trainer, "auxiliary_losses", name, view), name)
    for key, term in terms.items():
        if term.numel() != 1:
            raise PluginError(f"{name}: auxiliary loss {key!r} has shape {list(term.shape)}; it must be a scalar")
        if not term.requires_grad and bool(term != 0):  # 0 is a loss of nothing
            raise PluginError(
                f"{name}: auxiliary loss {key!r} carries no gradient, so nothing would learn from it; compute it from "
                f"view.observations, not detached, or give it in metrics()"
            )
    return terms


def check_reached(observations: Mapping[str, Tensor], used: Collection[str], name: str) -> None:
    """Refuse auxiliary losses that reach no parameter.

    They depend only on numbers that `Trainer.observe` gave without gradient, in a stage where all learns.

    Args:
        observations: of a micro-batch.
        used: names of those that the losses depend on; some may come from what does not learn, such as another model.
        name: what messages call the trainer.

    Raises:
        PluginError: none of them carries a gradient.
    """
    if used and not any(observations[key].requires_grad for key in used):
        names = ", ".join(map(repr, sorted(used)))
        raise PluginError(
            f"{name}: observe gave {names} without gradient, so nothing would learn from its auxiliary losses; detach "
            f"no more than the hidden states, and compute outside of torch.no_grad"
        )


def _token_tensors(method: str, returned: object, targets: Targets, name: str) -> dict[str, Tensor]:
    """Validate numbers for each token or each prediction."""
    values = _named_tensors(method, returned, name)
    rows, length, horizon = targets.ids.shape
    for key, value in values.items():
        if value.shape not in ((rows, length), (rows, length, horizon)):
            raise PluginError(
                f"{name}: {method} returned {key!r} of shape {list(value.shape)}; it must be "
                f"[b, S] = {[rows, length]} or [b, S, H] = {[rows, length, horizon]}"
            )
    return values


def _named_tensors(method: str, returned: object, name: str) -> dict[str, Tensor]:
    """Validate tensors by name."""
    if not isinstance(returned, Mapping):
        raise PluginError(f"{name}: {method} returned a {type(returned).__name__}, not tensors by name")
    for key, value in returned.items():
        if not isinstance(value, Tensor):
            raise PluginError(f"{name}: {method} returned a {type(value).__name__} as {key!r}, not a tensor")
    return dict(returned)


def checked_metrics(trainer: Trainer, name: str, own: Mapping[str, object]) -> Mapping[str, Tensor | float]:
    """Ask and validate `Trainer.metrics`.

    Args:
        trainer: the algorithm.
        name: what messages call it.
        own: the loop's own metrics, which stay what they are.

    Raises:
        PluginError: something else than numbers by name, or a name of the loop's.
    """
    metrics = asked(trainer, "metrics", name)
    if not isinstance(metrics, Mapping):
        raise PluginError(f"{name}: metrics returned a {type(metrics).__name__}, not numbers by name")
    for key in metrics:
        if not isinstance(key, str):
            raise PluginError(f"{name}: metrics returned a number named {key!r}; a name is text")
        if key in own or key in _OF_THE_LOOP or key.startswith("eval/"):
            raise PluginError(f"{name}: metrics returned {key!r}, which is the loop's own metric; call it something else")
    return metrics


def versions(view: StepView | HiddenView) -> dict[str, int]:
    """Count each view tensor's changes in place, as torch does anyway."""
    return {name: tensor._version for name, tensor in _tensors(view)}


def check_unchanged(view: StepView | HiddenView, before: Mapping[str, int], name: str) -> None:
    """Refuse in-place changes of a view's tensors, which the loop uses.

    Those are losses that are logged, targets and tokens.

    Args:
        view: what the trainer was given.
        before: its `versions` then.
        name: what messages call the trainer.

    Raises:
        PluginError: a tensor has changed.
    """
    for key, version in versions(view).items():
        if version != before[key]:
            raise PluginError(f"{name}: it changed view.{key} in place, which the loop still uses; change a clone() of it")


def _tensors(view: StepView | HiddenView) -> Iterator[tuple[str, Tensor]]:
    batch, targets = view.batch, view.targets
    is_step = isinstance(view, StepView)
    named = {
        "batch.input_ids": batch.input_ids,
        "batch.document": batch.document,
        "batch.position": batch.position,
        "batch.loss_mask": batch.loss_mask,
        "batch.weight": batch.weight,
        "targets.ids": targets.ids,
        "targets.valid": targets.valid,
        "token_loss": view._token_loss if is_step else None,
        "entropy": view._entropy if is_step else None,
        "trunk": None if is_step else view.trunk,
    }
    yield from ((key, tensor) for key, tensor in named.items() if tensor is not None)
    if is_step:
        yield from ((f"observations[{key!r}]", tensor) for key, tensor in view.observations.items())
    else:
        yield from ((f"hidden[{index}]", tensor) for index, tensor in enumerate(view.hidden))
