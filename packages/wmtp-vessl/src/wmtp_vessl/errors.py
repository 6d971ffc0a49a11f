"""What may go wrong with the service, where that has to be told apart."""

from __future__ import annotations

from wmtp.errors import PlatformError

__all__ = ["NotFoundError", "UnansweredError"]


class NotFoundError(PlatformError):
    """The service has no such thing."""


class UnansweredError(PlatformError):
    """The service could not be reached, or its answer was lost or broken."""
