"""How URIs become local files."""

from wmtp.storage.base import Storage

__all__ = ["Storage"]
