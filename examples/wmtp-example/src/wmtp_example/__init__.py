"""loss-truncation and loss-ceiling for WMTP.

Both let what the model finds hardest to explain count less, or not at all.
"""
