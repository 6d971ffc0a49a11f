"""Parts of a model folder that training leaves unchanged.

They are copied into saved models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from attrs import Factory, frozen
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from wmtp.errors import WMTPError
from wmtp.models.loaders.files import config_from, weight_files
from wmtp.models.loaders.shards import Shards
from wmtp.models.loaders.stored import StoredTensor, stored_tensors
from wmtp.models.native.search import is_mtp_name, promised_in

__all__ = ["Untouched", "promised_layers", "text_table", "without_empty_promises"]


@frozen(kw_only=True, eq=False)
class Untouched:
    """Tensors and files of a folder, written back as they are.

    Args:
        source: the folder, for messages.
        tensors: by the folder's own names. Their files stay open, so the folder may go away before they are written.
        config: the folder's ``config.json`` where it describes more than the model that was opened, less what
            `take_out_misplaced` found; None leaves it to transformers.
        text_table: the table of ``config`` that describes that model; None where it has none of its own.
        files: further files by name.
        names: of tensors that the model is saved under other names than the folder's: its names, and the folder's.
        shards: the folder's files, as which the model is written; None leaves them to transformers.
        problem: why not all of the folder could be written back; None where it can.
    """

    source: Path
    tensors: Mapping[str, StoredTensor] = Factory(dict)
    config: dict[str, Any] | None = None
    text_table: str | None = None
    files: Mapping[str, bytes] = Factory(dict)
    names: Mapping[str, str] = Factory(dict)
    shards: Shards | None = None
    problem: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Untouched:
        return self  # a copy of the model is saved with the same parts, read from the same open files

    def whole_config(self) -> PreTrainedConfig | None:
        """Make transformers' config of the whole folder.

        None where the model's own describes it.
        """
        return None if self.config is None else config_from(self.source / "config.json", dict(self.config))

    def take_out_misplaced(self) -> dict[str, Any]:
        """Remove generation settings that transformers refuses from ``config``.

        It does not keep them in a model's config. Returns them.
        """
        if self.config is None or (whole := self.whole_config()) is None:
            return {}
        tables = [(self.config, whole)]
        if self.text_table in self.config:
            tables.append((self.config[self.text_table], getattr(whole, self.text_table)))
        taken: dict[str, Any] = {}
        for table, config in tables:
            refused = config._get_generation_parameters()
            for name in GenerationConfig._get_default_generation_params():
                if name in table and (name in refused or not hasattr(config, name)):
                    taken[name] = table.pop(name)
        return {name: value for name, value in taken.items() if value is not None}

    def check_target(self, folder: Path) -> None:
        """Refuse to overwrite files that tensors are still read from.

        Raises:
            WMTPError: ``folder`` is the source, or something of the source would be lost.
        """
        if self.problem is not None:
            raise WMTPError(self.problem)
        if self.tensors and self.source.exists() and folder.samefile(self.source):
            raise WMTPError(f"{folder}: holds tensors that are copied when the model is saved; save into another folder")

    def write(
        self,
        folder: Path,
        model: PreTrainedModel,
        state: Mapping[str, Tensor] | None = None,
        added: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Complete a folder with the configs of ``model``.

        Where there are `shards`, its weights are written into their files.

        Args:
            folder: it.
            model: that is saved.
            state: its whole tensors, where this process holds only a part of them.
            added: further tensors, of the model's own layers for multi-token prediction, by the folder's names.

        Raises:
            OSError: it could not be written in full, or the source has changed.
        """
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if self.config is not None:
            content = _with_text_fields(self.config, self.text_table, model)
            (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if self.shards is None:
            return
        trained = _saved_tensors(model, state, self.names, self.shards) | dict(added or {})
        if twice := trained.keys() & self.tensors.keys():
            raise OSError(f"both trained and kept: {', '.join(sorted(twice))}")
        tensors = {name: self.shards.as_stored(name, tensor, model.dtype) for name, tensor in trained.items()}
        self.shards.write(folder, {**self.tensors, **tensors})


def promised_layers(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, int]:
    """Find what a config promises; see `promised_in`."""
    return promised_in(config if isinstance(config, Mapping) else config.to_dict())


def text_table(config: PreTrainedConfig) -> str | None:
    """Name the table of a config for its text model.

    None where that has none of its own.
    """
    text = config.get_text_config(decoder=True)
    return next((key for key in config.sub_configs if getattr(config, key, None) is text), None)


def without_empty_promises(folder: Path, config: PreTrainedConfig, table: str | None) -> dict[str, int]:
    """Lower a config's number of multi-token layers to those present.

    Such fields of a saved ``config.json`` count no more layers than the folder holds.

    Args:
        folder: complete but for this.
        config: of the model that was saved; its defaults, which ``config.json`` leaves out, are promises too.
        table: the one in ``config.json`` that describes it; None where there is none of its own.

    Returns:
        the fields that were set, and to what.
    """
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    # where the model is a part of the folder, the promises above its table are those of the whole
    tables = [(content, promised_layers(content))]
    own = content if table is None else content.setdefault(table, {})
    tables.append((own, promised_layers(text) | promised_layers(own)))
    if layers is None or not any(promises for _, promises in tables):
        return {}
    count = _count_mtp_layers(stored_tensors(weight_files(folder)), layers)
    lowered: dict[str, int] = {}
    for place, promises in tables:
        empty = {name: count for name, promised in promises.items() if promised > count}
        place |= empty
        lowered |= empty
    if lowered:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return lowered


def _count_mtp_layers(names: Collection[str], layers: int) -> int:
    """Count layers for multi-token prediction.

    Tensors that bear no number are of a single one.
    """
    stems = {found[1] for name in names if (found := re.match(rf"(.*?\b)layers\.{layers - 1}\.", name))}
    found = [name for name in names if is_mtp_name(name, stems, layers)]
    numbers = {number[1] for name in found if (number := re.search(r"[._](\d+)\.", name))}
    return len(numbers) or int(bool(found))


def _with_text_fields(own: Mapping[str, Any], text_table: str | None, model: PreTrainedModel) -> dict[str, Any]:
    """Update a folder's config with what a run may change.

    The parameters' type, and how a text begins and ends.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    content = dict(own)
    for key in [None, text_table] if text_table in own else [None]:
        table = content if key is None else dict(content[key])
        table.pop("torch_dtype", None)
        table["dtype"] = dtype
        if key is not None:
            content[key] = table
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(model.config, name, None)
            if value is not None and (name in table or key is not None):  # above the text's table only where it stood there
                table[name] = value
    return content


def _saved_tensors(
    model: PreTrainedModel, state: Mapping[str, Tensor] | None, names: Mapping[str, str], shards: Shards
) -> dict[str, Tensor]:
    """Name a model's tensors as `PreTrainedModel.save_pretrained` does.

    Copies of tied ones are named as in its folder.
    """
    own = dict(model.state_dict() if state is None else state)
    for name in model._keys_to_ignore_on_save or ():
        own.pop(name, None)
    sources = model.all_tied_weights_keys
    copies = {stored: own.get(name, own.get(sources.get(name, ""))) for stored, name in shards.tied.items()}
    written = revert_weight_conversion(model, remove_tied_weights_from_state_dict(own, model))
    trained = {names.get(name, name): tensor for name, tensor in written.items()}
    return {name: tensor for name, tensor in copies.items() if tensor is not None} | trained
