"""Triton implementation of the loss."""
