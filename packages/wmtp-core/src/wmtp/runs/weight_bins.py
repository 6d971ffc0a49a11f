"""Bins of the weight histograms. Torch-free."""

from __future__ import annotations

from typing import Final

__all__ = ["BINS_PER_OCTAVE", "HALF_BINS", "WEIGHT_BINS"]

#: bins of a factor 2^(1/4), around 2^(i/4) for i from −HALF_BINS to HALF_BINS: 1 is the middle of a bin
BINS_PER_OCTAVE: Final = 4
HALF_BINS: Final = 8 * BINS_PER_OCTAVE
#: the weight in the middle of each bin: 0 itself; less than all that follow; 2^−8 … 2^8; more
WEIGHT_BINS: Final = (0.0, *(2.0 ** (i / BINS_PER_OCTAVE) for i in range(-HALF_BINS - 1, HALF_BINS + 2)))
