"""Steps in a container before and after training: ``wmtp start``."""
