"""HTML page of runs: curves, weight distributions, texts coloured by weight."""

from wmtp.reporting.page import write_report

__all__ = ["write_report"]
