"""Failures of the service that callers tell apart."""

from __future__ import annotations

from wmtp.errors import PlatformError

__all__ = ["NotFoundError", "UnansweredError"]


class NotFoundError(PlatformError):
    """Object unknown to the service."""


class UnansweredError(PlatformError):
    """Service unreachable, or its answer lost or broken."""
