"""Object stores for WMTP. The config classes are here; importing them imports nothing heavy."""

from __future__ import annotations

from wmtp_storage.config import AzureStorage, GoogleStorage, HTTPStorage, S3Storage

__all__ = ["AzureStorage", "GoogleStorage", "HTTPStorage", "S3Storage"]
