"""Saving, tried before training.

What transformers will not write is repaired and logged, or refused.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from wmtp.errors import WMTPError, described
from wmtp.log_lines import transformers_quiet
from wmtp.models.ends import learn_ends
from wmtp.models.untouched import Untouched, text_table, without_empty_promises

if TYPE_CHECKING:
    from wmtp.tokenizers import Tokenizer

__all__ = ["make_savable", "write_base"]

_log = logging.getLogger("wmtp")


def make_savable(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None = None,
    *,
    source: Path | None = None,
    untouched: Untouched | None = None,
    scratch: Path | None = None,
) -> None:
    """Try to write all of ``model`` but its weights.

    The folder is removed afterwards. transformers refuses to write a generation config that contradicts itself (``do_sample =
    false`` with a ``temperature``), and a config with generation settings in it. Such settings are taken out, and a warning
    names them.

    Args:
        model: gets them taken out.
        tokenizer: is tried too. The model's configs will begin and end a text as it does.
        source: what messages call the model.
        untouched: what else its folder holds. Its config is repaired as the model's is.
        scratch: an existing folder to write in. Default: that for temporary files.

    Raises:
        WMTPError: something will not be written, and it is not known how to repair it; or the disk took nothing.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="wmtp-", dir=scratch) as place:
            _try(model, tokenizer, source, untouched, Path(place))
    except OSError as error:
        at = "; free space there, or name another folder in TMPDIR" if scratch is None else ""
        raise WMTPError(f"{scratch or 'temporary files'}: the model could not be written: {error}{at}") from error


def write_base(
    base: PreTrainedModel,
    folder: Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    source: Path | None = None,
    untouched: Untouched | None = None,
    added: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as transformers does, with its folder's other content.

    Args:
        base: the model.
        folder: made if it is not there.
        state: the whole tensors of ``base``, where this process holds only a part of them.
        source: what messages call the model.
        untouched: what else its folder holds.
        added: tensors of its own layers for multi-token prediction that were opened as heads, by the folder's names.

    Raises:
        WMTPError: it could not be written in full, or transformers refuses to write its configs.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        make_savable(base, source=source, untouched=untouched, scratch=folder)
        if untouched is not None:
            untouched.check_target(folder)
        index.unlink(missing_ok=True)  # of an older save
        if untouched is not None and untouched.shards is not None:
            _write_configs(base, folder)
        else:
            with transformers_quiet():
                base.save_pretrained(folder, state_dict=state)  # type: ignore[arg-type]
        if index.exists():  # readers would prefer the one file of an older save to these shards
            (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        table = text_table(base.config)
        if untouched is not None:
            untouched.write(folder, base, state, added)
            table = table if untouched.config is None else untouched.text_table
        lowered = without_empty_promises(folder, base.config, table)
    except (OSError, SafetensorError) as error:
        raise WMTPError(f"{folder}: the model could not be written: {error}") from error
    if lowered:
        found = ", ".join(f"{name} = {count}" for name, count in lowered.items())
        _log.info("the model has fewer layers of its own for multi-token prediction than its config says: %s is saved", found)


def _write_configs(base: PreTrainedModel, folder: Path) -> None:
    """Write what transformers does but for weights.

    Its own save would empty a file that the model may be mapped from.
    """
    with tempfile.TemporaryDirectory(prefix="wmtp-", dir=folder) as place:
        with transformers_quiet():
            base.save_pretrained(place, state_dict={})
        for file in Path(place).iterdir():
            if not file.name.startswith(SAFE_WEIGHTS_NAME):
                file.replace(folder / file.name)


def _try(
    model: PreTrainedModel, tokenizer: Tokenizer | None, source: Path | None, untouched: Untouched | None, scratch: Path
) -> None:
    where = "the model" if source is None else str(source)
    generation: GenerationConfig | None = model.generation_config if model.can_generate() else None
    if tokenizer is not None:
        learn_ends(model, tokenizer, where)
    if misplaced := _take_out_misplaced(model, untouched):
        _log.warning(
            "%s: config.json holds settings of generation, which transformers will not save there: %s; the saved model is "
            "without them",
            where, _listed(misplaced),
        )  # fmt: skip
    if generation is not None and (contrary := _take_out_contrary(generation, where, scratch)):
        _log.warning(
            "%s: its generation config contradicts itself (do_sample = %s), so transformers would refuse to save it; the saved "
            "model is without %s",
            where, generation.do_sample, _listed(contrary),
        )  # fmt: skip
    parts: dict[str, Callable[[Path], Any]] = {"config": model.config.save_pretrained}
    if untouched is not None and (whole := untouched.whole_config()) is not None:
        parts["config.json"] = whole.save_pretrained
    if tokenizer is not None:
        parts["tokenizer"] = tokenizer.save
    for what, save in parts.items():
        if (reason := _refusal(save, scratch)) is not None:
            raise WMTPError(f"{where}: its {what} cannot be saved: {reason}")


def _refusal(save: Callable[[Any], Any], scratch: Path) -> str | None:
    """Try a save in an empty folder, and return why it failed.

    None where it did not.

    Raises:
        OSError: the disk took nothing, which says nothing of what was to be written.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder, transformers_quiet():
        try:
            save(Path(folder))
        except Exception as error:  # transformers' exceptions have no common base
            if isinstance(error, OSError) and error.errno is not None:
                raise
            return described(error)
    return None


def _take_out_misplaced(model: PreTrainedModel, untouched: Untouched | None) -> dict[str, Any]:
    found = dict(model.config._get_generation_parameters())
    for name in found:
        delattr(model.config, name)
    if untouched is not None:
        generation = model.generation_config.to_dict() if model.generation_config is not None else {}
        taken = untouched.take_out_misplaced()
        # transformers has put into the generation config what a folder without one has in its config.json
        found |= {name: value for name, value in taken.items() if generation.get(name) != value}
    return found


def _take_out_contrary(generation: GenerationConfig, where: str, scratch: Path) -> dict[str, Any]:
    """Reset settings one by one until transformers writes the rest.

    Returns what they were.
    """
    default = GenerationConfig()
    taken: dict[str, Any] = {}
    while (reason := _refusal(generation.save_pretrained, scratch)) is not None:
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
