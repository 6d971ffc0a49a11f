"""The launcher for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.launchers.base import Launcher

if TYPE_CHECKING:
    from wmtp.config.schema import Config
    from wmtp.result import Result

__all__ = ["Local"]


class Local(Launcher):
    """Trains in this process."""

    def launch(self, config: Config, run_dir: Path, *, resume: bool) -> Result:
        """Train here; see `Launcher.launch`."""
        from wmtp.training.run import train

        return train(config, run_dir, resume=resume)
