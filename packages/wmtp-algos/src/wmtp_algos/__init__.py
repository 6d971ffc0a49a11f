"""Algorithms of WMTP; importing their config classes imports no torch."""

from __future__ import annotations

from wmtp_algos.adamtp import AdaMTP
from wmtp_algos.asft import ASFT
from wmtp_algos.baseline_mtp import BaselineMTP
from wmtp_algos.column import Column
from wmtp_algos.config import RandomMatched, Rho1WMTP, Shuffled
from wmtp_algos.critic_config import CriticWMTP
from wmtp_algos.dft import DFT
from wmtp_algos.distill import Distill
from wmtp_algos.eaft import EAFT
from wmtp_algos.entropy_top import EntropyTop
from wmtp_algos.focal import Focal
from wmtp_algos.horizon_decay import HorizonDecay
from wmtp_algos.sstoken import SSToken

__all__ = [
    "ASFT",
    "DFT",
    "EAFT",
    "AdaMTP",
    "BaselineMTP",
    "Column",
    "CriticWMTP",
    "Distill",
    "EntropyTop",
    "Focal",
    "HorizonDecay",
    "RandomMatched",
    "Rho1WMTP",
    "SSToken",
    "Shuffled",
]
