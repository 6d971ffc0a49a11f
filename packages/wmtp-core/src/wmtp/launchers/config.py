"""Config classes of the built-in launchers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from attrs import field, frozen

from wmtp.plugins.contract import LauncherConfig

if TYPE_CHECKING:
    from wmtp.launchers.base import Launcher

__all__ = ["LocalLauncher"]


#: more than any machine has devices or cores; each would be started, until the machine has no memory left
_MOST: Final = 1024


def _processes(_: object, __: object, value: object) -> None:
    if isinstance(value, int) and not 1 <= value <= _MOST:
        raise ValueError(f'must be "auto" or 1 to {_MOST}, not {value}: it is the number on each machine')


@frozen(kw_only=True)
class LocalLauncher(LauncherConfig):
    """Runs on this machine, in one process or several.

    Several are started by torchrun; those that torchrun or a cluster has started already are used as they are.

    Args:
        processes: on each machine, one a device. ``auto``: as many as there are GPUs that torch can use; 1 on a CPU. Several
            processes on a CPU talk by gloo, which is good for trying things out. Started by ``torchrun``, a number
            must be that of the processes started.
    """

    type = "local"
    processes: Literal["auto"] | int = field(default="auto", validator=_processes)

    def build(self) -> Launcher:
        """Make the launcher."""
        from wmtp.launchers.local import Local

        return Local(self.processes)
