"""Checks of a container before training, and samples of its load meanwhile."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Final

from wmtp.config.schema import Config
from wmtp.errors import ConfigError
from wmtp.launchers.samples import sample, sample_line
from wmtp.storage.uris import file_path, scheme_of

__all__ = ["check_machine", "limited_runtime", "sampled"]

logger = logging.getLogger("wmtp")

_SAMPLE_INTERVAL: Final = 60.0  # seconds
_SHARED_MEMORY: Final = 2**30  # bytes that NCCL and data loading want of /dev/shm


def check_machine(config: Config, folders: Iterator[Path] | list[Path]) -> None:
    """Find what would stop the run only after hours.

    Or after the models were fetched.

    Args:
        config: complete, with the local launcher.
        folders: where things are written besides what the config says.

    Raises:
        ConfigError: every problem at once.
    """
    problems = []
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            problems.append(f"this image has no {package}: install wmtp-core[train] in it")
    written = {"run.output_dir": file_path(config.run.output_dir)}
    if config.checkpoints.uri is not None and scheme_of(config.checkpoints.uri) == "file":
        written["checkpoints.uri"] = file_path(config.checkpoints.uri)
    written |= {f"folder {folder}": folder for folder in folders}
    for key, folder in written.items():
        if problem := _unwritable(folder):
            problems.append(f"{key}: {problem}")
    if problems:
        raise ConfigError(problems)
    wanted = os.environ.get("WMTP_VERSION")
    if wanted is not None and wanted != metadata.version("wmtp-core"):
        logger.warning(
            "this image has wmtp-core %s, the run was planned with %s: a default may have changed",
            metadata.version("wmtp-core"),
            wanted,
        )
    shared = Path("/dev/shm")
    if shutil.which("nvidia-smi") and shared.is_dir() and shutil.disk_usage(shared).total < _SHARED_MEMORY:
        logger.warning("/dev/shm has less than 1 GiB, which NCCL may find too little; docker run --shm-size 8g gives more")


def _unwritable(folder: Path) -> str | None:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        return f"{there} is no folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} may not be written to by user {os.getuid()}; mount a folder that may, or change its owner"
    return None


@contextmanager
def limited_runtime() -> Iterator[None]:
    """Send this process SIGTERM after ``WMTP_MAX_RUNTIME`` seconds.

    The run then saves a checkpoint and ends.

    Raises:
        ConfigError: the variable holds no number of seconds.
    """
    text = os.environ.get("WMTP_MAX_RUNTIME")
    if text is None:
        yield
        return
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < threading.TIMEOUT_MAX:
        raise ConfigError(f"WMTP_MAX_RUNTIME: {text!r} is no number of seconds")

    def stop() -> None:
        logger.warning("the run has had its %g s (max_runtime): it saves a checkpoint and ends", limit)
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(limit, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def sampled(folder: Path, interval: float = _SAMPLE_INTERVAL) -> Iterator[None]:
    """Log samples of the machine's load, for ``wmtp metrics``."""
    over = threading.Event()

    def write() -> None:
        while True:
            try:
                logger.info("%s", sample_line(sample(folder)))
            except Exception as error:  # it must not stop the training
                logger.warning("the machine could not be measured: %s", error)
                return
            if over.wait(interval):
                return

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=1.0)
