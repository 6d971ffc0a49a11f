"""The algorithms of WMTP. The config classes are here; importing them imports no torch."""

from __future__ import annotations

from wmtp_algos.config import (
    DFT,
    EAFT,
    BaselineMTP,
    Column,
    EntropyTop,
    Focal,
    HorizonDecay,
    RandomMatched,
    Rho1WMTP,
    Shuffled,
)

__all__ = [
    "DFT",
    "EAFT",
    "BaselineMTP",
    "Column",
    "EntropyTop",
    "Focal",
    "HorizonDecay",
    "RandomMatched",
    "Rho1WMTP",
    "Shuffled",
]
