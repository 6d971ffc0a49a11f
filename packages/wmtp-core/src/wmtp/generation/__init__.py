"""Text generation: plain or self-speculative, with a key-value cache.

Self-speculative decoding takes the drafts of the extra heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wmtp.generation.base import DraftCounts, Generation, Sampling
from wmtp.lazy import lazy_names

if TYPE_CHECKING:
    from wmtp.generation.compiled import compile_model
    from wmtp.generation.decoding import generate, stream
    from wmtp.generation.kept import release

__all__ = ["DraftCounts", "Generation", "Sampling", "compile_model", "generate", "release", "stream"]

__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(("generate", "stream"), "wmtp.generation.decoding")
    | {"release": "wmtp.generation.kept", "compile_model": "wmtp.generation.compiled"},
)
