"""Names of an adapter's parameters, in a model and in PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

__all__ = ["ADAPTER_NAME", "is_adapter_name", "saved_name", "split_state"]

#: PEFT's name of the one adapter
ADAPTER_NAME: Final = "default"


def is_adapter_name(name: str) -> bool:
    """Tell the parameters of an adapter by their name."""
    return any(part.startswith("lora_") for part in name.split("."))


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split adapted heads' state into plain tensors and adapter tensors.

    The former under the names that they have without adapters, the latter by `saved_name`.
    """
    own = {name: tensor for name, tensor in state.items() if not is_adapter_name(name)}
    # experts have an adapter for each of their tensors, one around the other
    plain = {".".join(part for part in name.split(".") if part != "base_layer"): tensor for name, tensor in own.items()}
    return plain, {saved_name(name): tensor for name, tensor in state.items() if is_adapter_name(name)}


def saved_name(name: str) -> str:
    """Name a parameter as PEFT's files do."""
    short = name.replace(f".{ADAPTER_NAME}", "")
    return f"base_model.model.{short.removesuffix('.weight') if 'lora_magnitude_vector' in short else short}"
