"""Language models with heads for the next H tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wmtp.lazy import lazy_names
from wmtp.models.base import LoadedModel, ModelInfo, ModelLoader

if TYPE_CHECKING:
    from wmtp.models.build import build_model
    from wmtp.models.mtp import MTPModel, MTPOutput
    from wmtp.models.opening import load_model

__all__ = ["LoadedModel", "MTPModel", "MTPOutput", "ModelInfo", "ModelLoader", "build_model", "load_model"]

__getattr__ = lazy_names(  # torch takes seconds to import: only those who use these names pay for it
    __name__,
    {
        "MTPModel": "wmtp.models.mtp",
        "MTPOutput": "wmtp.models.mtp",
        "build_model": "wmtp.models.build",
        "load_model": "wmtp.models.opening",
    },
)
