"""Plugin of wmtp-storage."""

from __future__ import annotations

import wmtp
from wmtp_storage.config import AzureStorage, GoogleStorage, HTTPStorage, S3Storage

__all__ = ["wmtp_storages"]


@wmtp.hookimpl
def wmtp_storages() -> list[type]:
    """S3, Google Cloud Storage, Azure Blob Storage and web servers."""
    return [S3Storage, GoogleStorage, AzureStorage, HTTPStorage]
