"""Sandbox for code that a model wrote; importing it imports no torch."""

from wmtp.sandbox.run import Isolation, Limits, Outcome, Sandbox

__all__ = ["Isolation", "Limits", "Outcome", "Sandbox"]
