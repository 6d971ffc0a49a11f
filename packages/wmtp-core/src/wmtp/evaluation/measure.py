"""Runs evaluators, and writes what they found."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
from attrs import evolve
from torch.distributed.fsdp import FSDPModule

from wmtp.devices import device_name
from wmtp.distributed.ranks import SINGLE_PROCESS
from wmtp.errors import PluginError, WMTPError
from wmtp.evaluation.base import Estimate, Measured
from wmtp.evaluation.unchanged import ModelState
from wmtp.generation import release
from wmtp.json_files import read_json_object
from wmtp.plugins.built import built
from wmtp.plugins.provenance import provenance
from wmtp.storage.atomic import replace_text

__all__ = ["DETAILS_FILE", "NUMBERS_FILE", "measure", "prepare"]

logger = logging.getLogger("wmtp")

NUMBERS_FILE = "evaluation.json"
DETAILS_FILE = "evaluation-details.json"


def measure(evaluators: Sequence[Any], measured: Measured, folder: Path | None) -> dict[str, float]:
    """Measure with each evaluator in order, and write its results.

    What one has found is written before the next begins.

    Args:
        evaluators: instances of config classes.
        measured: the model and the data.
        folder: gets ``evaluation.json``, the numbers by name, and ``evaluation-details.json``, in which each stands with its
            interval, n, seed and settings. What stands there under other names stays. None: nothing is written.

    Returns:
        the numbers by name, without details.

    Raises:
        PluginError: an evaluator breaks its contract.
        WMTPError: something cannot be measured or written.
    """
    numbers: dict[str, float] = {}
    met: list[str] = []
    for config in evaluators:
        met.append(config.type)
        # a second evaluator of a type, with other settings, gets a name of its own
        label = config.type if met.count(config.type) == 1 else f"{config.type}-{met.count(config.type)}"
        alone = config.one_process and measured.ranks is not None and measured.ranks.world_size > 1
        if alone and isinstance(measured.model, FSDPModule):
            logger.warning(
                "%s: needs the whole model in one process, and here it is sharded: measure the saved one with wmtp eval RUN",
                label,
            )
            continue
        evaluator, name = built(config, "evaluators"), provenance(config, "evaluator")
        before = ModelState.of(measured.model)
        started = time.perf_counter()
        if alone and measured.ranks is not None:  # the others wait
            found = measured.ranks.main_only(lambda evaluator=evaluator: evaluator.evaluate(evolve(measured, ranks=None)))
        else:
            found = evaluator.evaluate(measured)
        changed = list(before.changes(ModelState.of(measured.model)))
        (measured.ranks or SINGLE_PROCESS).collective(partial(_refuse_changes, name, changed))
        if not isinstance(found, Mapping):
            raise PluginError(f"{name}: evaluate returned a {type(found).__name__}, not numbers by name")
        for key, value in found.items():
            if not isinstance(key, str) or not _is_number(value):
                raise PluginError(f"{name}: evaluate returned {value!r:.60} as {key!r}, not a number")
        own = {f"{label}/{key}": float(value) for key, value in found.items() if "/" not in key}
        numbers |= own
        if folder is not None:
            details = _details(config, measured, found, time.perf_counter() - started)
            _write(folder, own, label, details)
        logger.info("%s: %s", label, ", ".join(f"{key} {_text(found[key])}" for key in found if "/" not in key))
    release(measured.model)
    return numbers


def prepare(evaluators: Sequence[Any], fetch: Callable[[str, str], Path]) -> None:
    """Have evaluators check what they will need; see `Evaluator.prepare`.

    Args:
        evaluators: instances of config classes.
        fetch: see `Measured`.

    Raises:
        PluginError: an evaluator breaks its contract.
        WMTPError: one could not measure.
    """
    for config in evaluators:
        built(config, "evaluators").prepare(fetch)


def _refuse_changes(name: str, changed: Sequence[str]) -> None:
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise PluginError(f"{name}: evaluate {changed[0]}{others}, which others measure after it; restore it, or use a copy")


def _text(value: float | Estimate) -> str:
    if not isinstance(value, Estimate):
        return f"{value:.4g}"
    return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a tensor of several numbers, say
        return False
    return not isinstance(value, str)


def _details(config: Any, measured: Measured, found: Mapping[str, float | Estimate], seconds: float) -> dict[str, Any]:
    settings = {key: value for key, value in attrs.asdict(config).items() if value is not None}
    return {
        "settings": settings,
        "seed": measured.seed,
        "seconds": round(seconds, 3),
        "device": device_name(measured.device),
        "dtype": str(measured.model.anatomy.output.weight.dtype).removeprefix("torch."),
        "versions": {name: metadata.version(name) for name in ("wmtp-core", "torch", "transformers")},
        "results": {
            name: attrs.asdict(value) if isinstance(value, Estimate) else {"value": float(value)}
            for name, value in found.items()
        },
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: _finite(element) for key, element in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(folder: Path, numbers: Mapping[str, float], kind: str, details: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, prefix, new in ((NUMBERS_FILE, f"{kind}/", numbers), (DETAILS_FILE, kind, {kind: details})):
            file = folder / name
            old = read_json_object(file) if file.is_file() else {}
            kept = {key: value for key, value in old.items() if not (key == prefix or key.startswith(f"{kind}/"))}
            replace_text(file, json.dumps(_finite({**kept, **new}), indent=2, default=str) + "\n")
    except (OSError, ValueError) as error:
        raise WMTPError(f"{folder}: the results could not be written: {error}") from error
