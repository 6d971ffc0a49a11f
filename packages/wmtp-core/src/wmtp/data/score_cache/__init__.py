"""Numbers of tokens and documents that are computed once and kept."""
