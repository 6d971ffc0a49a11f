"""Saving tried before training: what transformers will not write is repaired and said, or refused."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel

from wmtp.errors import WMTPError
from wmtp.models.loaders.files import quiet

if TYPE_CHECKING:
    from wmtp.tokenizers import Tokenizer

__all__ = ["make_savable"]

_log = logging.getLogger("wmtp")


def make_savable(model: PreTrainedModel, tokenizer: Tokenizer | None = None, *, source: Path | None = None) -> None:
    """Have all of ``model`` but its weights written once, to a folder that is removed.

    transformers refuses to write a generation config that contradicts itself (``do_sample = false`` with a ``temperature``),
    and a config with generation settings in it. Such settings are taken out, and a warning names them.

    Args:
        model: gets them taken out. Where it names no end of a text, it gets the tokenizer's.
        tokenizer: is tried too.
        source: what messages call the model.

    Raises:
        WMTPError: something will not be written, and it is not known how to repair it.
    """
    where = "the model" if source is None else str(source)
    generation: GenerationConfig | None = model.generation_config if model.can_generate() else None
    if tokenizer is not None and generation is not None and generation.eos_token_id is None:
        # a new model does not know yet where a text ends
        generation.eos_token_id = model.config.eos_token_id = tokenizer.eos_id
    if misplaced := _take_out_misplaced(model):
        _log.warning(
            "%s: config.json holds settings of generation, which transformers will not save there: %s; the saved model is "
            "without them",
            where, _listed(misplaced),
        )  # fmt: skip
    if generation is not None and (contrary := _take_out_contrary(generation, where)):
        _log.warning(
            "%s: its generation config contradicts itself (do_sample = %s), so transformers would refuse to save it; the saved "
            "model is without %s",
            where, generation.do_sample, _listed(contrary),
        )  # fmt: skip
    parts: dict[str, Callable[[Path], Any]] = {"config": model.config.save_pretrained}
    if tokenizer is not None:
        parts["tokenizer"] = tokenizer.save
    for what, save in parts.items():
        if (reason := _refusal(save)) is not None:
            raise WMTPError(f"{where}: its {what} cannot be saved: {reason}")


def _refusal(save: Callable[[Any], Any]) -> str | None:
    """Try to write into an empty folder, and return why it failed; None where it did not."""
    with tempfile.TemporaryDirectory(prefix="wmtp-") as folder, quiet():
        try:
            save(Path(folder))
        except Exception as error:  # transformers' exceptions have no common base
            return f"{type(error).__name__}: {error}"
    return None


def _take_out_misplaced(model: PreTrainedModel) -> dict[str, Any]:
    found = dict(model.config._get_generation_parameters())
    for name in found:
        delattr(model.config, name)
    return found


def _take_out_contrary(generation: GenerationConfig, where: str) -> dict[str, Any]:
    """Reset settings one by one until transformers writes the rest, and return what they were."""
    default = GenerationConfig()
    taken: dict[str, Any] = {}
    while (reason := _refusal(generation.save_pretrained)) is not None:
        # it lists settings without an effect one a line, and otherwise names the setting first
        names = re.findall(r"^- `(\w+)`", reason, re.MULTILINE) or re.findall(r"`(\w+)`", reason)
        name = next((name for name in names if name not in taken and _is_set(generation, default, name)), None)
        if name is None:
            raise WMTPError(f"{where}: its generation config cannot be saved: {reason}")
        taken[name] = getattr(generation, name)
        if hasattr(default, name):
            setattr(generation, name, getattr(default, name))
        else:
            delattr(generation, name)
    return taken


def _is_set(generation: GenerationConfig, default: GenerationConfig, name: str) -> bool:
    missing = object()
    return getattr(generation, name, missing) != getattr(default, name, missing)


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())
