"""Tensors of a folder that a causal model does not take.

They are kept, or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from attrs import Factory, frozen
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from wmtp.errors import FileError, WMTPError
from wmtp.models.loaders.describe import empty_model
from wmtp.models.loaders.files import has_stand_in, read_json, weight_files
from wmtp.models.loaders.shards import find_shards
from wmtp.models.loaders.stored import StoredTensor, stored_tensors
from wmtp.models.native.find import find_native
from wmtp.models.native.found import Native
from wmtp.models.native.search import is_mtp_name
from wmtp.models.untouched import Untouched, promised_layers, text_table

__all__ = ["Opening", "find_untouched"]

#: what a multimodal folder has besides a tokenizer's files
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
_SHOWN = 12


@frozen(kw_only=True)
class Opening:
    """Tensors of a folder, by what becomes of them on opening.

    Args:
        untouched: those that the model does not take, to be written back.
        kept: what transformers calls these.
        unknown: what belongs to nothing that is known.
        native: layers for multi-token prediction among ``untouched`` that can be heads.
        plain: the model's name of each tensor that it takes as it is, with the folder's name.
        types: safetensors' names of the types of all tensors that the model takes.
    """

    untouched: Untouched
    kept: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()
    native: Native | None = None
    plain: Mapping[str, str] = Factory(dict)
    types: frozenset[str] = frozenset()


@frozen(kw_only=True)
class _Match:
    """Names in a folder beside those of a model.

    Args:
        taken: the model's name → the folder's names that become it.
        left: the folder's name → the names that transformers gives it, which the model does not have.
        plain: those of ``taken`` that are renamed and nothing else.
    """

    taken: Mapping[str, list[str]]
    left: Mapping[str, list[str]]
    plain: Mapping[str, str]


def find_untouched(folder: Path, config: PreTrainedConfig) -> Opening:
    """Compare a folder's tensors with those of transformers' model.

    No weight is read. transformers drops names by ``_keys_to_ignore_on_load_unexpected`` before it reports any. What it drops,
    further parts of a multimodal folder and layers for multi-token prediction are kept.

    Where they could not be, `Untouched.problem` names them: the model can be used, and not trained.

    Raises:
        WMTPError: two tensors become the same one.
    """
    stored = stored_tensors(weight_files(folder))
    model = empty_model(config)
    match = _match(model, stored, folder)
    left = _ignored(model, match.left)
    if getattr(config, "quantization_config", None) is not None:
        # the quantizer's own renaming is known only once it runs; transformers' report covers what it does not ignore
        lost = f"{folder}: is quantized and has tensors that would be lost: {_some(left)}; use one in bf16 or fp32"
        return Opening(untouched=Untouched(source=folder, files=_processor_files(folder), problem=lost if left else None))
    _check_types(folder, stored, match)
    mtp = _mtp_names(config, match)
    left |= mtp
    is_part = type(model.config) is not type(config)
    own_config = read_json(folder / "config.json") if has_stand_in(config) else None
    names: Mapping[str, str] = {}
    if is_part and (set(match.left) - mtp):
        own_config = read_json(folder / "config.json")
        try:
            of_whole, names = _of_the_whole(model, config, stored, match, folder)
            left = of_whole | mtp
        except WMTPError as error:
            return Opening(untouched=Untouched(source=folder, problem=str(error)))
    untouched = Untouched(
        source=folder,
        tensors={name: stored[name] for name in sorted(left)},
        config=own_config,
        text_table=None if own_config is None else text_table(config),
        names=names,
        files=_processor_files(folder) | _code_files(folder, own_config),
        shards=find_shards(
            folder,
            stored,
            renamed={own: name for own, name in match.plain.items() if own not in stored},
            tied={match.plain[own]: own for own in model.all_tied_weights_keys if own in match.plain},
        ),
    )
    native = find_native(model, config, untouched.tensors, said=_said_layers(folder, config), others=bool(mtp))
    kept = frozenset(name for own in left for name in match.left[own])
    return Opening(
        untouched=untouched,
        kept=kept,
        unknown=tuple(sorted(set(match.left) - left)),
        native=native,
        plain=match.plain,
        types=frozenset(stored[name].dtype for names in match.taken.values() for name in names),
    )


def _match(model: PreTrainedModel, names: Iterable[str], folder: Path) -> _Match:
    """Rename as ``from_pretrained`` does.

    ``model`` then saves under the names of the folder, too.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [step for step in conversions if isinstance(step, WeightRenaming)]
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    taken: dict[str, list[str]] = {}
    left: dict[str, list[str]] = {}
    plain: dict[str, str] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = rename_source_key(name, [], [], prefix, own)
        targets = [renamed]
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            targets += [renamed.replace(first, other) for other in others]
        if renamed not in own:
            left[name] = targets
            continue
        if pattern is None:
            plain[renamed] = name
        for target in targets:
            taken.setdefault(target, []).append(name)
        if pattern is None and len(taken[renamed]) > 1:
            raise FileError(f"{folder}: {' and '.join(taken[renamed])} are both {renamed} of {type(model).__name__}")
    model._weight_conversions = [step for step in conversions if step.was_used()]  # type: ignore[assignment]
    return _Match(taken=taken, left=left, plain=plain)


def _check_types(folder: Path, stored: Mapping[str, StoredTensor], match: _Match) -> None:
    """Refuse fp8 weights whose scales are not known.

    They are numbers only together with scales, which a quantizer knows.

    Raises:
        WMTPError: the model would take such a tensor as it is.
    """
    small = [name for names in match.taken.values() for name in names if stored[name].dtype.startswith("F8_")]
    if small:
        raise FileError(
            f"{folder}: holds weights in fp8 ({_some(small)}), and its config.json does not say how they are scaled; use the "
            "model in bf16 or fp32"
        )


def _said_layers(folder: Path, config: PreTrainedConfig) -> dict[str, int]:
    """Return the layers that ``config.json`` itself promises.

    A model's defaults are no promise of this folder.
    """
    content = read_json(folder / "config.json")
    return promised_layers(content) | promised_layers(content.get(text_table(config) or "") or {})


def _mtp_names(config: PreTrainedConfig, match: _Match) -> set[str]:
    """Return the folder's names of multi-token prediction layers.

    Empty where the config does not say that there are any.
    """
    text = config.get_text_config(decoder=True)
    if not promised_layers(text):
        return set()
    # the prefix of ``layers.N`` in the names that the model takes
    names = (name for names in match.taken.values() for name in names)
    stems = {found[1] for name in names if (found := re.match(r"(.*?\b)layers\.\d+\.", name))}
    return {name for name in match.left if is_mtp_name(name, stems, text.num_hidden_layers)}


def _ignored(model: PreTrainedModel, left: Mapping[str, list[str]]) -> set[str]:
    """Return the folder's names of what transformers drops without a word."""
    report: Any = SimpleNamespace(missing_keys=set(), unexpected_keys={name for names in left.values() for name in names})
    model._adjust_missing_and_unexpected_keys(report)
    return {own for own, names in left.items() if not set(names) & report.unexpected_keys}


def _of_the_whole(
    model: PreTrainedModel, config: PreTrainedConfig, stored: Collection[str], match: _Match, folder: Path
) -> tuple[set[str], dict[str, str]]:
    """Return what a multimodal folder has besides its text model.

    Together they must make it whole again. With it come the folder's names of tensors that the text model would be saved under
    other names.

    Raises:
        WMTPError: it cannot be written back so that the multimodal class opens it.
    """
    name = (getattr(config, "architectures", None) or ["none"])[0]
    whole_class = getattr(transformers, name, None)
    if not (
        isinstance(whole_class, type) and issubclass(whole_class, PreTrainedModel) and whole_class.config_class is type(config)
    ):
        raise FileError(
            f"{folder}: has more than {type(model).__name__} takes ({_some(match.left)}), and its config.json names no "
            f"architecture of transformers for all of it ({name})"
        )
    written = set(revert_weight_conversion(model, model.state_dict())) - set(model.all_tied_weights_keys)
    names = {own: match.plain[own] for own in written - set(stored) if own in match.plain}
    if renamed := written - set(stored) - set(names):
        raise FileError(
            f"{folder}: the text model in it would be saved under other names than {name} reads ({_some(renamed)}), and so the "
            f"folder could not be made whole again; give the text model alone, saved by {type(model).__name__}.save_pretrained"
        )
    with torch.device("meta"):
        whole = whole_class._from_config(config)
    of_whole = _match(whole, stored, folder)
    persistent = set(whole.state_dict()) - set(whole.all_tied_weights_keys)
    if missing := persistent - set(of_whole.taken):
        raise FileError(f"{folder}: the tensors do not fit {name}: {'; '.join(f'{n} is missing' for n in sorted(missing))}")
    known = {own for names in of_whole.taken.values() for own in names} | _ignored(whole, of_whole.left)
    return {own for own in match.left if own in known}, names


def _processor_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _PROCESSOR_FILES if (folder / name).is_file()}


def _code_files(folder: Path, config: Mapping[str, Any] | None) -> dict[str, bytes]:
    """Keep the code files that a config names.

    Other programs may run them; WMTP never does.
    """
    return {} if config is None or "auto_map" not in config else {file.name: file.read_bytes() for file in folder.glob("*.py")}


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
