"""loss-truncation and loss-ceiling for WMTP: what the model finds hardest to explain counts less, or not at all."""
