"""Config classes of the built-in storage backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from wmtp.storage.base import Storage

__all__ = ["FileStorage"]


@frozen(kw_only=True)
class FileStorage:
    """Files and folders of this machine: plain paths, ``~`` and ``file:///…``."""

    type = "file"
    schemes = ("file",)

    def build(self) -> Storage:
        """Make the backend."""
        from wmtp.storage.file import File

        return File()
