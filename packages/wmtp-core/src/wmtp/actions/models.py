"""Functions on trained models and runs.

Every function takes a model in every form. Imports no torch before it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.actions.files import storage_section
from wmtp.config.load import ConfigSource
from wmtp.errors import ConfigError
from wmtp.public import public

if TYPE_CHECKING:
    import torch

    from wmtp.evaluation.command import Evaluated
    from wmtp.exporting.command import Exported
    from wmtp.models.mtp import MTPModel
    from wmtp.tokenizers import Tokenizer

__all__ = ["evaluate", "export", "load_model", "load_tokenizer", "report"]


@public
def load_model(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> MTPModel:
    """Open a model with all its heads, in eval mode.

    A plain Hugging Face model has head 1 alone.

    Args:
        model: a run directory, a model folder (as WMTP, Hugging Face or Meta write it), a ``.gguf`` file, or a URI of those.
        dtype: of the parameters. Default: as saved.
        device: where it shall be.
        config: a TOML file or mapping, or several, whose ``[storage]`` says how to reach the store of a URI.
        overrides: ``KEY=VALUE`` texts laid over those.

    Raises:
        ConfigError: there is no such model.
        WMTPError: files are missing, damaged or do not fit together.
    """
    from wmtp.models import opening

    return opening.load_model(model, dtype=dtype, device=device, storage=storage_section(config, overrides))


@public
def load_tokenizer(
    model: str | os.PathLike[str], *, config: ConfigSource | Sequence[ConfigSource] = (), overrides: Iterable[str] = ()
) -> Tokenizer:
    """Open the tokenizer of a model.

    Arguments: see `load_model`.

    Raises:
        ConfigError: there is no such model.
        WMTPError: it has no tokenizer, or a damaged one.
    """
    from wmtp.models.opening import find_model, find_tokenizer

    return find_tokenizer(*find_model(model, storage_section(config, overrides)))


@public
def evaluate(
    model: str | os.PathLike[str],
    config: ConfigSource | Sequence[ConfigSource] = (),
    *,
    overrides: Iterable[str] = (),
    output: str | os.PathLike[str] | None = None,
    allow_code_execution: bool = False,
) -> Evaluated:
    """Measure a trained model, as ``wmtp eval`` does.

    Args:
        model: as for `load_model`.
        config: a TOML file or mapping, or several, laid over the run's config; for a model that stands alone, what to measure
            and on which data.
        overrides: ``KEY=VALUE`` texts laid over those.
        output: the folder for results. Default: the run directory, or ``evaluations/NAME``.
        allow_code_execution: whether evaluators may run code that the model wrote.

    Raises:
        ConfigError: there is no such model, nothing to measure, or the config is wrong.
        WMTPError: something cannot be read, measured or written.
    """
    from wmtp.evaluation.command import evaluate_model

    place = None if output is None else os.fspath(output)
    return evaluate_model(
        os.fspath(model), config, overrides=overrides, output=place, allow_code_execution=allow_code_execution
    )


@public
def export(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    format: str,
    checkpoint: str | int | None = None,
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Exported:
    """Write a model for other tools, as ``wmtp export`` does.

    Args:
        model: as for `load_model`.
        folder: a folder that is not there yet, or is empty. It appears whole or not at all.
        format: ``hf``, ``wmtp``, ``meta``, ``mtp`` or ``medusa``.
        checkpoint: of a run, in place of its model: ``best``, ``last``, or the step of one that it has kept.
        config: as for `load_model`.
        overrides: ``KEY=VALUE`` texts laid over those.

    Raises:
        ConfigError: there is no such model or format, the format cannot hold the model, or the folder is not empty.
        WMTPError: something cannot be read or written.
    """
    from wmtp.exporting.command import export_model

    kept = None if checkpoint is None else str(checkpoint)
    place, storage = os.fspath(folder), storage_section(config, overrides)
    return export_model(os.fspath(model), place, format=format, checkpoint=kept, storage=storage)


@public
def report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    config: ConfigSource | Sequence[ConfigSource] = (),
    overrides: Iterable[str] = (),
) -> Path:
    """Write an HTML report of one or more runs.

    As ``wmtp report`` does: one page, which compares several runs.

    Args:
        runs: run directories, of runs in any state, or the URIs that were their ``checkpoints.uri``; or one of them.
        output: the file. Default: ``report.html`` in the run directory; of several runs, or of a URI, in the current one.
        config: as for `load_model`.
        overrides: ``KEY=VALUE`` texts laid over those.

    Returns:
        the file.

    Raises:
        ConfigError: a directory holds no run.
        WMTPError: a file of a run is damaged, or the page cannot be written.
    """
    from wmtp.reporting import write_report

    several = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    if not several:
        raise ConfigError("runs: an empty list; name at least one run directory")
    place = None if output is None else os.fspath(output)
    return write_report([os.fspath(run) for run in several], place, storage=storage_section(config, overrides))
