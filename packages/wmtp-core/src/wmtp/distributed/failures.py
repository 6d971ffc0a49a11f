"""Errors of one rank that every rank must raise."""

from __future__ import annotations

import socket

from attrs import frozen

from wmtp.errors import ConfigError, PluginError, WMTPError, described

__all__ = ["Failure", "heard"]


@frozen(kw_only=True)
class Failure:
    """Error of one rank, as sent to the others.

    Args:
        rank: its rank.
        host: its machine.
        kind: class of the error.
        lines: of its message.
    """

    rank: int
    host: str
    kind: type[WMTPError]
    lines: tuple[str, ...]

    @classmethod
    def of(cls, error: Exception, rank: int) -> Failure:
        """Describe an error of this process."""
        if isinstance(error, ConfigError):
            kind, lines = ConfigError, tuple(error.problems)
        elif isinstance(error, WMTPError):
            kind, lines = (PluginError if isinstance(error, PluginError) else WMTPError), (str(error),)
        else:
            kind, lines = WMTPError, (described(error),)
        return cls(rank=rank, host=socket.gethostname(), kind=kind, lines=lines)

    def error(self, *, named: bool) -> WMTPError:
        """Make the error again; ``named``: with the rank's name."""
        name = f"rank {self.rank} ({self.host}): " if named else ""
        lines = [f"{name}{line}" for line in self.lines]
        return ConfigError(lines) if self.kind is ConfigError else self.kind("\n".join(lines))


def heard(error: Exception) -> Exception:
    """Mark an error that rank 0 has too, and says."""
    error.said_by_main = True  # type: ignore[attr-defined]
    return error
