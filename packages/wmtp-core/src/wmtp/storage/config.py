"""Config classes of the built-in storage backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from wmtp.plugins.contract import StorageBackendConfig

if TYPE_CHECKING:
    from wmtp.storage.base import Storage

__all__ = ["FileStorage", "PackageStorage"]


@frozen(kw_only=True)
class FileStorage(StorageBackendConfig):
    """Files and folders of this machine: plain paths, ``~`` and ``file:///…``."""

    type = "file"
    schemes = ("file",)

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp.storage.file import File

        return File()


@frozen(kw_only=True)
class PackageStorage(StorageBackendConfig):
    """Files that an installed Python package brings along: ``package://MODULE/PATH``."""

    type = "package"
    schemes = ("package",)

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp.storage.package import Package

        return Package()
