"""Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from wmtp.models.base import LoadedModel, ModelInfo, ModelLoader

__all__ = ["HfLoader"]


class HfLoader(ModelLoader):
    """Opens a folder."""

    def __init__(self, *, gguf_file: str | None = None, attn_implementation: str | None = None) -> None:
        self._gguf_file = gguf_file
        self._attn_implementation = attn_implementation

    def info(self, path: Path | None) -> ModelInfo:
        """See `ModelLoader.info`."""
        raise NotImplementedError

    def load(self, path: Path | None, *, dtype: torch.dtype | None, seed: int) -> LoadedModel:
        """See `ModelLoader.load`."""
        return LoadedModel(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True).eval()
        )
