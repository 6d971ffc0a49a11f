"""loss-truncation for WMTP: examples that the model finds hardest to explain are left out."""
