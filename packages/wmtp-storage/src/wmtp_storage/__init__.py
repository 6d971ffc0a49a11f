"""Object stores for WMTP; importing their config classes imports nothing heavy."""

from __future__ import annotations

from wmtp_storage.config import AzureStorage, GoogleStorage, HTTPStorage, S3Storage

__all__ = ["AzureStorage", "GoogleStorage", "HTTPStorage", "S3Storage"]
