"""The contract of a launcher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wmtp.config.schema import Config
    from wmtp.result import Result

__all__ = ["Launcher"]


class Launcher(ABC):
    """Makes a checked config run somewhere."""

    @abstractmethod
    def launch(self, config: Config, run_dir: Path, *, resume: bool) -> Result:
        """Run ``config`` to its end.

        Args:
            config: complete and checked.
            run_dir: the run directory; it holds ``config.toml`` and ``run.json`` already.
            resume: whether to go on from the newest checkpoint of that directory.
        """
