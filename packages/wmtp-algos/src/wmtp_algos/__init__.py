"""The algorithms of WMTP."""
