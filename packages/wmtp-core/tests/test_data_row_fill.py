"""Rows are full of ordinary text: best fit leaves next to nothing empty."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from wmtp.data.packing import best_fit


@pytest.mark.parametrize("documents", ["files", "functions"])
@pytest.mark.parametrize("capacity", [512, 2048])
def test_rows_of_real_text_are_98_percent_full(documents: str, capacity: int) -> None:
    """Python's standard library by bytes; what is longer than a row is split, as ``overlong = "split"`` does."""
    texts = [path.read_text(errors="replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    if documents == "functions":
        texts = [part for text in texts for part in re.split(r"\n(?= *(?:def|class) )", text)]
    lengths = np.array([len(text[start : start + capacity]) for text in texts for start in range(0, len(text), capacity)])
    rows = best_fit(lengths, capacity)
    in_rows = rows.lengths(lengths)
    assert in_rows.max() <= capacity
    assert in_rows.sum() == lengths.sum(), "every document is in one row"
    assert in_rows.mean() / capacity > 0.98
