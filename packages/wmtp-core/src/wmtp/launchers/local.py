"""Launcher for this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wmtp.cores import check_memory_of_processes
from wmtp.distributed.environment import Nodes, Worker
from wmtp.errors import ConfigError
from wmtp.launchers.base import Launcher

if TYPE_CHECKING:
    from wmtp.config.schema import Config
    from wmtp.runs.result import Result

__all__ = ["Local"]


class Local(Launcher):
    """Trains in this process, or starts several.

    Args:
        processes: on this machine; ``auto``: one a GPU.
    """

    def __init__(self, processes: Literal["auto"] | int) -> None:
        self._processes = processes

    def launch(self, config: Config, run_dir: Path, *, resume: bool) -> Result:
        """Train here; see `Launcher.launch`."""
        # beside torch and transformers, whose import takes longer
        threading.Thread(target=config.tracker.preload, name="wmtp-preload").start()
        from wmtp.training.run import train

        nodes = Nodes.of()
        count = self.count(config)
        if count * nodes.count > 1:
            from wmtp.launchers.torchrun import launch

            return launch(config, nodes, count, run_dir=run_dir, resume=resume)
        if config.devices.fsdp is None:
            return train(config, run_dir, resume=resume)
        from wmtp.distributed.start import joined

        with joined(config, Worker(rank=0, world_size=1, local_rank=0)) as ranks:
            return train(config, run_dir, resume=resume, ranks=ranks)

    def follow(self, config: Config, nodes: Nodes) -> Result:
        """Start the processes of a machine other than the first.

        The run directory is on the first one.
        """
        from wmtp.launchers.torchrun import launch

        return launch(config, nodes, self.count(config), run_dir=None, resume=False)

    def check_started(self, environment: Mapping[str, str] = os.environ) -> None:
        """Compare the config with the processes that torchrun has started already.

        Raises:
            ConfigError: there are more or fewer on this machine than the config says.
        """
        started = environment.get("LOCAL_WORLD_SIZE", "")
        if self._processes != "auto" and started.isdecimal() and int(started) != self._processes:
            raise ConfigError(
                f"launcher.processes: {self._processes}, but {started} were started on this machine already, by torchrun or a "
                f'cluster; write {started} or "auto"'
            )

    def count(self, config: Config) -> int:
        """Processes on this machine.

        Raises:
            ConfigError: it has fewer devices, or not the memory that so many take before they have a model.
        """
        from wmtp.devices import count_devices, pick_device

        device = pick_device(config.devices.device)
        available = count_devices(device)
        if isinstance(self._processes, str):  # "auto"
            return available or 1
        if available is not None and self._processes > available:
            raise ConfigError(
                f"launcher.processes: {self._processes}, but this machine has {available} {device.type} device"
                f'{"s" if available > 1 else ""} that torch can use; write at most {available}, or "auto"'
            )
        if available is None:
            check_memory_of_processes(f"launcher.processes: {self._processes} processes on a CPU", self._processes)
        return self._processes
