"""Storage backends: from URIs to local files."""

from wmtp.storage.base import Fetched, Storage, StoredFile
from wmtp.storage.uris import backend_for, localize

__all__ = ["Fetched", "Storage", "StoredFile", "backend_for", "localize"]
