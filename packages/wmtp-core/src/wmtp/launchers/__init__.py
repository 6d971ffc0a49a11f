"""Where a run happens: on this machine, or elsewhere."""

from wmtp.launchers.base import Launcher, LaunchPlan, RemoteLauncher, RunState, RunStatus

__all__ = ["LaunchPlan", "Launcher", "RemoteLauncher", "RunState", "RunStatus"]
