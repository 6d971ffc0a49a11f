"""Where a run happens: on this machine, or elsewhere."""

from wmtp.launchers.base import Launcher

__all__ = ["Launcher"]
