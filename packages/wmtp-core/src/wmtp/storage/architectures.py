"""Architectures of the installed transformers, whose source is read as text.

Imports neither transformers nor torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from wmtp.spelling import did_you_mean

__all__ = ["STAND_INS", "LinearMaps", "is_unknown", "linear_maps"]

#: architectures that transformers does not have, by the one whose tensors and arithmetic are theirs but for layers for
#: multi-token prediction
STAND_INS: Final = {"mimo": "qwen2"}
#: ``self.q_proj = nn.Linear(``, and over several lines
_MAP: Final = re.compile(r"self\.(\w+)\s*=\s*\(?\s*(?:\w+\.)*(?:\w*Linear\w*|Conv1D)\(")
_CLASS: Final = re.compile(r"^class (\w+)", re.MULTILINE)
_LANGUAGE_MODEL: Final = re.compile(r"\w+(?:ForCausalLM|LMHeadModel)")
#: modules of another file, whose names are not in this one
_BORROWED: Final = re.compile(r"^\s*from \.\.\w+\.modeling_", re.MULTILINE)


@frozen
class LinearMaps:
    """Names of an architecture's linear maps, as far as its source tells.

    Args:
        layers: of maps in layers, without the path to them.
        unembeddings: of maps of the language model itself.
        tied: the unembedding is the embedding too, as the config says.
        words: in the source. A module whose name is none of them is nowhere in the model.
    """

    layers: list[str]
    unembeddings: frozenset[str]
    tied: bool
    words: frozenset[str]

    def problem(self, name: str) -> str | None:
        """Say why a module cannot be a linear map of the layers.

        None where it may be one; only the model itself tells for certain.
        """
        leaf = name.rpartition(".")[2]
        if leaf.isdigit():  # of a list or sequence
            return None
        if leaf in self.unembeddings and leaf not in self.layers:
            tied = " (and is the embedding too: they are tied)" if self.tied else ""
            return f"{name!r} is the unembedding, which all heads share{tied}; it stays as it is: leave it out"
        if leaf in self.words:
            return None
        hint = did_you_mean(leaf, self.layers) or f"there are: {', '.join(self.layers)}"
        return f"{name!r} is no linear map of this model; {hint}"


def linear_maps(content: Mapping[str, Any]) -> LinearMaps | None:
    """Read which linear maps the model of a ``config.json`` has.

    None where one source file does not tell: of several models in one, where another file has its modules, or where the
    architecture is another package's.
    """
    model_type = content.get("model_type")
    models = _models_folder()
    if not isinstance(model_type, str) or models is None or any(isinstance(content[key], dict) for key in _parts(content)):
        return None
    name = _plain_name(STAND_INS.get(model_type, model_type))
    owner = max((own for own in _folders(models) if _is_of(name, own)), key=len, default=None)
    if owner is not None and name != owner and not _is_listed(models, model_type):  # llama_mine, which a plugin registers
        return None
    if owner is None or not (source := models / owner / f"modeling_{owner}.py").is_file():
        return None
    text = source.read_text(encoding="utf-8")
    if _BORROWED.search(text):
        return None
    layers: dict[str, None] = {}
    unembeddings: set[str] = set()
    starts = [*_CLASS.finditer(text)]
    for number, start in enumerate(starts):
        end = starts[number + 1].start() if number + 1 < len(starts) else len(text)
        found = _MAP.findall(text, start.end(), end)
        if _LANGUAGE_MODEL.fullmatch(start[1]):
            unembeddings.update(found)
        elif not re.search("For|Heads", start[1]):  # these are of other tasks
            layers |= dict.fromkeys(found)
    if not layers:
        return None
    tied, words = content.get("tie_word_embeddings") is True, frozenset(re.findall(r"\w+", text))
    return LinearMaps(sorted(layers), frozenset(unembeddings), tied, words)


def _parts(content: Mapping[str, Any]) -> list[str]:
    return [key for key in content if key.endswith("_config") and key != "quantization_config"]


def is_unknown(content: Mapping[str, Any]) -> bool:
    """Tell whether transformers lacks the architecture of a ``config.json``.

    It has neither a folder for it, nor its name in its tables.
    """
    model_type = content.get("model_type")
    if model_type in STAND_INS or not isinstance(model_type, str) or "mtp_config" in content:
        return False
    models = _models_folder()
    known = [] if models is None else _folders(models)
    if models is None or not known or any(_is_of(_plain_name(model_type), own) for own in known):
        return False
    return not _is_listed(models, model_type) and not _is_registered(model_type)


def _is_listed(models: Path, model_type: str) -> bool:
    """Tell whether transformers' own tables have an architecture."""
    return any(f'"{model_type}"' in file.read_text(encoding="utf-8") for file in (models / "auto").glob("*.py"))


def _is_registered(model_type: str) -> bool:
    """Tell whether a plugin has registered an architecture with transformers.

    It has imported transformers then.
    """
    auto = sys.modules.get("transformers.models.auto.configuration_auto")
    return auto is not None and model_type in auto.CONFIG_MAPPING


def _models_folder() -> Path | None:
    found = find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "models"
    return folder if folder.is_dir() else None


def _folders(models: Path) -> list[str]:
    return [entry.name for entry in models.iterdir() if entry.is_dir()]


def _plain_name(model_type: str) -> str:
    return model_type.replace("-", "_").lower()


def _is_of(name: str, owner: str) -> bool:
    return name == owner or name.startswith(f"{owner}_")
