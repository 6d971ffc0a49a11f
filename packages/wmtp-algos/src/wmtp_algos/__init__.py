"""The algorithms of WMTP. The config classes are here; importing them imports no torch."""

from __future__ import annotations

from wmtp_algos.config import (
    DFT,
    EAFT,
    AdaMTP,
    BaselineMTP,
    Column,
    EntropyTop,
    Focal,
    HorizonDecay,
    RandomMatched,
    Rho1WMTP,
    Shuffled,
)
from wmtp_algos.critic_config import CriticWMTP

__all__ = [
    "DFT",
    "EAFT",
    "AdaMTP",
    "BaselineMTP",
    "Column",
    "CriticWMTP",
    "EntropyTop",
    "Focal",
    "HorizonDecay",
    "RandomMatched",
    "Rho1WMTP",
    "Shuffled",
]
