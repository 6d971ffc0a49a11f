"""Language models with heads for the next H tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wmtp.models.base import LoadedModel, ModelInfo, ModelLoader

if TYPE_CHECKING:
    from wmtp.models.build import build_model, load_model
    from wmtp.models.mtp import MTPModel, MTPOutput

__all__ = ["LoadedModel", "MTPModel", "MTPOutput", "ModelInfo", "ModelLoader", "build_model", "load_model"]

_TORCH_NAMES = {
    "MTPModel": "wmtp.models.mtp",
    "MTPOutput": "wmtp.models.mtp",
    "build_model": "wmtp.models.build",
    "load_model": "wmtp.models.build",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only those who use these names pay for it
    if name in _TORCH_NAMES:
        from importlib import import_module

        return getattr(import_module(_TORCH_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
