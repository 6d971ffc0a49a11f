"""Parts of a model folder that training does not touch, written back beside what was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from attrs import Factory, frozen
from transformers import PreTrainedConfig, PreTrainedModel

from wmtp.errors import WMTPError
from wmtp.models.loaders.files import weight_files
from wmtp.models.loaders.stored import StoredTensor, stored_tensors, write_stored

__all__ = ["Untouched", "is_mtp_name", "promised_layers", "without_empty_promises"]

_INDEX = "model.safetensors.index.json"
_MTP = re.compile(r"(^|[._])(mtp|nextn)([._\d]|$)")


@frozen(kw_only=True, eq=False)
class Untouched:
    """Tensors and files of a model folder that are written back as they are.

    Args:
        source: the folder, for messages.
        tensors: by the folder's own names. Their files stay open, so the folder may go away before they are written.
        config: the folder's ``config.json`` where it describes more than the model that was opened; None leaves it to
            transformers.
        text_table: the table of ``config`` that describes that model; None where it has none of its own.
        files: further files by name.
        problem: why not all of the folder could be written back; None where it can.
    """

    source: Path
    tensors: Mapping[str, StoredTensor] = Factory(dict)
    config: Mapping[str, Any] | None = None
    text_table: str | None = None
    files: Mapping[str, bytes] = Factory(dict)
    problem: str | None = None

    def check_target(self, folder: Path) -> None:
        """Refuse to save over the files that tensors are still to be read from, and clear an index that a save left.

        Raises:
            WMTPError: ``folder`` is the source, or something of the source would be lost.
        """
        if self.problem is not None:
            raise WMTPError(self.problem)
        if self.tensors and self.source.exists() and folder.samefile(self.source):
            raise WMTPError(f"{folder}: holds tensors that are copied when the model is saved; save into another folder")
        (folder / _INDEX).unlink(missing_ok=True)

    def write(self, folder: Path, model: PreTrainedModel) -> None:
        """Complete a folder that ``model.save_pretrained`` wrote.

        Raises:
            OSError: it could not be written in full, or the source has changed.
        """
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if self.config is not None:
            content = _with_text_fields(self.config, self.text_table, model)
            (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if self.tensors:
            _add_shard(folder, self.tensors)


def promised_layers(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, int]:
    """Fields of a config that say how many layers for multi-token prediction there are, where they say any.

    They are called ``mtp_num_hidden_layers``, ``num_nextn_predict_layers``, ``num_mtp_layers`` …
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    return {
        name: value
        for name, value in fields.items()
        if _MTP.search(name) and "num" in name.split("_") and isinstance(value, int) and value > 0
    }


def is_mtp_name(name: str, stems: Collection[str], layers: int) -> bool:
    """Recognise a tensor of a layer for multi-token prediction by its name.

    Args:
        name: of the tensor.
        stems: what stands before ``layers.N`` in the names of decoder layers.
        layers: how many of those there are; further ones are for multi-token prediction.
    """
    if _MTP.search(name):
        return True
    found = re.match(r"(.*?\b)layers\.(\d+)\.", name)
    return found is not None and found[1] in stems and int(found[2]) >= layers


def without_empty_promises(folder: Path, config: PreTrainedConfig) -> list[str]:
    """Have a saved ``config.json`` count no layers for multi-token prediction where the folder holds none.

    Args:
        folder: complete but for this.
        config: of the model that was saved; its defaults, which ``config.json`` leaves out, are promises too.

    Returns:
        the fields that were set to 0.
    """
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    if not promised_layers(text) or layers is None:
        return []
    names = stored_tensors(weight_files(folder))
    stems = {found[1] for name in names if (found := re.match(rf"(.*?\b)layers\.{layers - 1}\.", name))}
    if any(is_mtp_name(name, stems, layers) for name in names):
        return []
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    tables = [value for value in content.values() if isinstance(value, dict) and value.get("model_type") == text.model_type]
    table = tables[0] if tables else content
    table |= dict.fromkeys(promised_layers(text), 0)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return list(promised_layers(text))


def _with_text_fields(own: Mapping[str, Any], text_table: str | None, model: PreTrainedModel) -> dict[str, Any]:
    """Put what a run may change into the folder's config: the parameters' type, and the end of a text where it had none."""
    dtype = str(model.dtype).removeprefix("torch.")
    content = dict(own)
    for key in [None, text_table] if text_table in own else [None]:
        table = content if key is None else dict(content[key])
        table.pop("torch_dtype", None)
        table["dtype"] = dtype
        if key is not None:
            if table.get("eos_token_id") is None and model.config.eos_token_id is not None:
                table["eos_token_id"] = model.config.eos_token_id
            content[key] = table
    return content


def _add_shard(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Add tensors to a saved model as one more shard, and write the index anew."""
    shards = weight_files(folder)
    count = len(shards) + 1
    weight_map: dict[str, str] = {}
    total = 0

    def enter(found: Mapping[str, StoredTensor], name: str) -> None:
        nonlocal total
        if twice := found.keys() & weight_map.keys():
            raise OSError(f"both trained and kept: {', '.join(sorted(twice))}")
        weight_map.update(dict.fromkeys(found, name))
        total += sum(tensor.size for tensor in found.values())

    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for shard, name in zip(shards, names[:-1], strict=True):
        enter(stored_tensors([shard]), name)
        shard.rename(folder / name)
    enter(tensors, names[-1])
    write_stored(folder / names[-1], tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
