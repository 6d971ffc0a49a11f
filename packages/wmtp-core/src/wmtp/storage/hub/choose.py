"""Choice of the files to fetch from a repository.

A model is fetched once, not in every format that it is kept in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Final

from wmtp.errors import ConfigError
from wmtp.storage.hub.names import HubName
from wmtp.storage.walk import is_hidden

__all__ = ["chosen_files"]

#: what goes with the weights: configs, tokenizers, chat templates
_COMPANIONS: Final = frozenset({".json", ".model", ".txt", ".jinja", ".tiktoken"})
_TEMPLATES: Final = "additional_chat_templates/"
#: formats of weights, the first that is there is taken
_WEIGHTS: Final = (".safetensors", ".bin", ".pth", ".gguf")
#: the same weights once more, in Mistral's or Meta's layout, or another precision: ``model.fp16.safetensors``
_COPIES: Final = re.compile(r"consolidated.*|(model|pytorch_model)\.(?!safetensors|bin).+")
_MODEL_FILES: Final = ("config.json", "params.json")
_NOT_WEIGHTS: Final = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pth", "scheduler.pth"})
_ONE_FILE: Final = re.compile(r"(?:model|pytorch_model)\.(?:safetensors|bin)")
_NOT_DATA: Final = frozenset({".md", ".py", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".ipynb"})
_SHOWN: Final = 6


def chosen_files(name: HubName, names: Collection[str]) -> Sequence[str]:
    """Choose the files to fetch, of those in a repository.

    Of a model folder: configs, tokenizer, and its weights in one format, safetensors first. Folders inside it (``onnx/``,
    ``original/``) are left out. Of a data set: all but pages, pictures and code. A file that is named is taken as it is, a
    folder that is no model whole.

    Raises:
        ConfigError: there is nothing at the path, or several GGUF files to choose from.
    """
    if name.path in names:
        return [name.path]
    prefix = f"{name.path}/" if name.path else ""
    inside = sorted(file for file in names if file.startswith(prefix))
    if not inside:
        near = ", ".join(sorted({file.partition("/")[0] for file in names})[:_SHOWN])
        what = f"no {name.path!r}; at the top are {near}" if name.path else "no files"
        raise ConfigError(f"{name.uri}: the repository holds {what}")
    if name.kind == "datasets":
        return [file for file in inside if _is_data(file)]
    beside = [file for file in inside if "/" not in file[len(prefix) :]]
    if not any(PurePosixPath(file).name in _MODEL_FILES or file.endswith(_WEIGHTS) for file in beside):
        return [file for file in inside if file != ".gitattributes"]
    companions = [file for file in beside if PurePosixPath(file).suffix in _COMPANIONS]
    templates = [file for file in inside if file.startswith(f"{prefix}{_TEMPLATES}")]
    weights = _weights(name, beside)
    return [file for file in companions if not _index_of_another_format(file, weights)] + templates + weights


def _is_data(file: str) -> bool:
    path = PurePosixPath(file)
    return path.suffix.lower() not in _NOT_DATA and not is_hidden(path)


def _weights(name: HubName, beside: Sequence[str]) -> list[str]:
    for suffix in _WEIGHTS:
        files = [file for file in beside if file.endswith(suffix) and PurePosixPath(file).name not in _NOT_WEIGHTS]
        if not files:
            continue
        if suffix == ".gguf" and len(files) > 1:
            shown = ", ".join(files[:_SHOWN]) + (" …" if len(files) > _SHOWN else "")
            at = "" if name.revision is None else f"@{name.revision}"
            raise ConfigError(
                f"{name.uri}: holds {len(files)} GGUF files, the same model in several sizes; name one of them, as"
                f" hf://{name.repo}{at}/{files[0]}: {shown}"
            )
        originals = [file for file in files if not _COPIES.fullmatch(PurePosixPath(file).name)]
        return _whole_or_shards(originals or files)
    return []


def _whole_or_shards(files: list[str]) -> list[str]:
    """Leave out the shards of a model that one file holds whole.

    That file is the one that transformers reads.
    """
    whole = [file for file in files if _ONE_FILE.fullmatch(PurePosixPath(file).name)]
    if not whole:
        return files
    stem = PurePosixPath(whole[0]).stem
    return [file for file in files if not re.fullmatch(rf"{stem}-\d+-of-\d+", PurePosixPath(file).stem)]


def _index_of_another_format(file: str, weights: Sequence[str]) -> bool:
    """Tell whether a file indexes shards that are not taken."""
    match = re.fullmatch(r"(.+)(\.safetensors|\.bin)\.index(\..+)?\.json", PurePosixPath(file).name)
    if match is None:
        return False
    shard = re.compile(rf"{re.escape(match[1])}-\d+-of-\d+{re.escape(match[2])}")
    return not any(shard.fullmatch(PurePosixPath(weight).name) for weight in weights)
