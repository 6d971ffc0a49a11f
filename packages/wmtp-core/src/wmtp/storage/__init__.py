"""How URIs become local files."""

from wmtp.storage.base import Storage
from wmtp.storage.uris import backend_for, localize

__all__ = ["Storage", "backend_for", "localize"]
