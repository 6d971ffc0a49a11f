"""Measurements of a trained model."""

from wmtp.evaluation.base import Estimate, Evaluator, Measured

__all__ = ["Estimate", "Evaluator", "Measured"]
