"""Files of a trainer's own modules in a run's model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

from wmtp.errors import WMTPError
from wmtp.models.tensor_fit import misfits

__all__ = ["load_module", "save_modules"]

#: a folder of its own: what reads a model folder may open every safetensors file there
_FOLDER = "modules"


def save_modules(modules: Mapping[str, nn.Module], model_folder: Path) -> None:
    """Write ``modules/NAME.safetensors`` for each module of a trainer.

    Args:
        modules: by name.
        model_folder: of the run's model.
    """
    folder = model_folder / _FOLDER
    for name, module in modules.items():
        folder.mkdir(exist_ok=True)
        save_model(module, str(folder / f"{name}.safetensors"))


def load_module(module: nn.Module, name: str, source: Path) -> None:
    """Read the tensors of a module that another run has learned.

    Args:
        module: gets them; it must be of the same shape.
        name: its name among the trainer's modules.
        source: the run directory, its model folder, or the file.

    Raises:
        WMTPError: there is no such file, or a tensor is missing, unexpected or of another shape; the message names it.
    """
    file = f"{_FOLDER}/{name}.safetensors"
    places = [source] if source.is_file() else [source / file, source / "model" / file]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise WMTPError(f"{source}: holds no {file}; give a finished run, or its model folder")
    try:
        tensors = load_file(found)
    except (OSError, SafetensorError) as error:
        raise WMTPError(f"{found}: not a whole safetensors file ({error})") from error
    own = module.state_dict()
    stored = {own[key].data_ptr() for key in tensors if key in own}  # tied tensors are stored once
    wanted = {key: tuple(tensor.shape) for key, tensor in own.items() if key in tensors or tensor.data_ptr() not in stored}
    if problems := misfits(wanted, tensors):
        raise WMTPError(f"{found}: its tensors do not fit this run's {name!r}: {'; '.join(problems)}")
    module.load_state_dict(tensors, strict=False)
