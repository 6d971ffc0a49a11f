"""Runs code that a model wrote, apart from everything else on the machine. Importing it imports no torch."""

from wmtp.sandbox.run import Isolation, Limits, Outcome, Sandbox

__all__ = ["Isolation", "Limits", "Outcome", "Sandbox"]
