"""One HTML page that shows runs: curves, the distribution of their weights, and texts coloured by the weight of each token."""

from wmtp.reporting.page import write_report

__all__ = ["write_report"]
