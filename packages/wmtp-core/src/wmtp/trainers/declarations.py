"""Ask a trainer what it declares outside of steps, and validate it.

That is its attributes, modules, learning rates, stages, groups of the data, and state.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from wmtp.errors import ConfigError, PluginError
from wmtp.plugins.names import misspelt_names
from wmtp.trainers.base import Stage, Trainer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wmtp.data.dataset import TokenDataset

__all__ = [
    "check_data",
    "check_trainer",
    "checked_groups",
    "checked_modules",
    "checked_rates",
    "checked_stages",
    "checked_state",
]


def check_trainer(trainer: object, name: str) -> Trainer:
    """Validate a new trainer, before anything is loaded for it.

    Args:
        trainer: what a config class built.
        name: what messages call it.

    Raises:
        PluginError: it is no trainer, or breaks the contract in a way that its class or its attributes show.
    """
    if not isinstance(trainer, Trainer):
        raise PluginError(f"{name}: build returned a {type(trainer).__name__}, not a wmtp.Trainer")
    own = {key: value for key, value in vars(trainer).items() if not key.startswith("_")}
    problems = [
        *type(trainer).contract_problems(trainer),
        *(
            f"{type(trainer).__name__} sets self.{key}, which WMTP does not read; did you mean {meant!r}?"
            for key, meant in misspelt_names(type(trainer), own)
        ),
    ]
    if problems:
        raise PluginError("\n".join(f"{name}: {problem}" for problem in problems))
    return trainer


def check_data(trainer: Trainer, dataset: TokenDataset, name: str) -> None:
    """Ask `Trainer.check_data`, and raise what it finds.

    Raises:
        ConfigError: it found something.
        PluginError: what it found is no list of texts.
    """
    problems = trainer.check_data(dataset)
    if not isinstance(problems, list | tuple) or not all(isinstance(problem, str) for problem in problems):
        raise PluginError(f"{name}: check_data returned {problems!r:.60}; it must be one text for each problem, in a list")
    if problems:
        raise ConfigError(problems)


def checked_groups(trainer: Trainer, name: str, dataset: TokenDataset, stage: Stage) -> NDArray[np.int64] | None:
    """Ask and validate `Trainer.groups`.

    Args:
        trainer: the algorithm.
        name: what messages call it.
        dataset: the training data.
        stage: one of the run's.

    Raises:
        PluginError: something else than a whole number for each piece, or no document is left.
    """
    groups = trainer.groups(dataset, stage)
    if groups is None:
        return None
    groups = np.asarray(groups)
    if groups.shape != (len(dataset),) or groups.dtype.kind not in "iu":
        raise PluginError(
            f"{name}: groups returned {groups.dtype} of shape {list(groups.shape)} for stage {stage.name!r}; "
            f"it must be a whole number for each of {len(dataset)} pieces"
        )
    groups = groups.astype(np.int64)
    if not (groups >= 0).any():
        raise PluginError(f"{name}: groups leaves no document to stage {stage.name!r}")
    return groups


def checked_stages(returned: object, name: str) -> Sequence[Stage]:
    """Validate what `Trainer.stages` returned.

    Raises:
        PluginError: it is no list of stages, or a stage has steps that are no whole number, or freezes a text.
    """
    if not isinstance(returned, list | tuple) or not all(isinstance(stage, Stage) for stage in returned):
        raise PluginError(f"{name}: stages returned {returned!r:.80}; it must be a list of wmtp.Stage")
    if not returned:
        raise PluginError(f"{name}: stages returned an empty list; a run has one stage or more: [wmtp.Stage()]")
    for stage in returned:
        if stage.steps is not None and type(stage.steps) is not int:
            raise PluginError(f"{name}: stage {stage.name!r} has steps = {stage.steps!r}; write a whole number, or None")
        if not isinstance(stage.frozen, frozenset | set):
            raise PluginError(f"{name}: stage {stage.name!r} has frozen = {stage.frozen!r}; write a set of names")
    return list(returned)


def checked_modules(trainer: Trainer, name: str) -> dict[str, nn.Module]:
    """Ask and validate `Trainer.modules`.

    Their names become those of files at the end of the run.

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
    """Ask and validate `Trainer.learning_rates`.

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


def checked_state(trainer: Trainer, name: str) -> dict[str, Any]:
    """Ask and validate `Trainer.state_dict`.

    A checkpoint must be able to load it without running code stored in it.

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
