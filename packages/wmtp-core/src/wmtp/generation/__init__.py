"""Text from a model: plain decoding with a key-value cache, and self-speculative decoding by the extra heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wmtp.generation.base import DraftCounts, Generation, Sampling

if TYPE_CHECKING:
    from wmtp.generation.decoding import generate, stream

__all__ = ["DraftCounts", "Generation", "Sampling", "generate", "stream"]


def __getattr__(name: str) -> Any:
    if name in ("generate", "stream"):
        from wmtp.generation import decoding

        return getattr(decoding, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
