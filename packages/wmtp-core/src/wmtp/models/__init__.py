"""Language models with heads for the next H tokens."""

from wmtp.models.base import LoadedModel, ModelInfo, ModelLoader

__all__ = ["LoadedModel", "ModelInfo", "ModelLoader"]
