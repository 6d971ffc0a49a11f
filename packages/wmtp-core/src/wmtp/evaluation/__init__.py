"""Measurements of a trained model."""

from wmtp.evaluation.base import Evaluator, Measured

__all__ = ["Evaluator", "Measured"]
