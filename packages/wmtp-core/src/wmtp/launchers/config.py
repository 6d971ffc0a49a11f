"""Config classes of the built-in launchers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from wmtp.launchers.base import Launcher

__all__ = ["LocalLauncher"]


@frozen(kw_only=True)
class LocalLauncher:
    """Runs on this machine, in this process."""

    type = "local"

    def build(self) -> Launcher:
        """Make the launcher."""
        from wmtp.launchers.local import Local

        return Local()
