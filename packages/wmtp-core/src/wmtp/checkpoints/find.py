"""Find the checkpoints to resume from, the same on all processes."""

from __future__ import annotations

import logging
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.checkpoints.local import Checkpoint, list_checkpoints
from wmtp.checkpoints.remote import RemoteCheckpoints
from wmtp.config.schema import Config
from wmtp.distributed.ranks import Ranks
from wmtp.errors import ConfigError, WMTPError
from wmtp.runs.step_file import set_aside_damaged, warn_of_gap
from wmtp.storage.atomic import remove_partial
from wmtp.storage.uris import file_path, scheme_of

if TYPE_CHECKING:
    from wmtp.data.prepare import PreparedData

__all__ = ["checkpoint_folder", "compare_data", "find_checkpoints"]

_log = logging.getLogger("wmtp")


def checkpoint_folder(config: Config, run_dir: Path) -> Path:
    """Return the local folder of a run's checkpoints."""
    uri = config.checkpoints.uri
    return run_dir / "checkpoints" if uri is None or scheme_of(uri) != "file" else file_path(uri)


def find_checkpoints(
    config: Config, run_dir: Path, remote: RemoteCheckpoints | None, ranks: Ranks, *, resume: bool
) -> list[Checkpoint]:
    """List the checkpoints to resume from, oldest first.

    The newest is fetched where it is in the store alone. What killed processes left is removed.

    Raises:
        ConfigError: there are some, but the run is not to be resumed.
        WMTPError: a rank does not see them, or the newest could not be fetched.
    """
    folder = checkpoint_folder(config, run_dir)
    saved = ranks.main_only(lambda: _tidy(folder, run_dir, remote, resume=resume))
    if saved:
        ranks.main_only(lambda: _tidy_records(run_dir, saved[-1].step, config.train.log_interval))
        ranks.collective(lambda: _see(saved[-1].path))
    return saved


def _tidy(folder: Path, run_dir: Path, remote: RemoteCheckpoints | None, *, resume: bool) -> list[Checkpoint]:
    """Remove what killed processes left; list the checkpoints to resume from.

    The newest is fetched where it is in the store alone.
    """
    if folder.parent != run_dir:  # the run directory is known to be writable
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draft = folder / f".new-{uuid.uuid4().hex}"
            draft.mkdir()
            draft.rmdir()
        except OSError as error:  # found out now, not when there are steps to save
            raise ConfigError(f"checkpoints.uri: cannot write to {folder}: {error.strerror or error}") from None
    remove_partial(folder)
    remove_partial(run_dir)
    saved = list_checkpoints(folder)
    if saved and not resume:
        raise ConfigError(
            f"checkpoints.uri: {folder} holds checkpoints of another run; choose another folder, or resume that run"
        )
    if remote is not None and not resume:
        remote.check_is_free()
    if remote is not None:
        uploaded = remote.steps()
        remote.tidy()
        if uploaded and (not saved or uploaded[-1] > saved[-1].step):
            saved = [*saved, remote.fetch(uploaded[-1], folder)]
            remote.fetch_steps(run_dir)  # this directory may be of an earlier part of the run
    if resume and not saved:
        _log.warning("no checkpoint to resume from in %s; training starts anew", folder)
    return saved


def _tidy_records(run_dir: Path, step: int, interval: int) -> None:
    """Repair the step records, and warn where the curve has a gap."""
    for name in ("metrics.jsonl", "weights.jsonl", "samples.jsonl"):
        set_aside_damaged(run_dir / name)
    warn_of_gap(run_dir / "metrics.jsonl", step, interval)


def _see(path: Path) -> None:
    if not path.is_dir():
        raise WMTPError(f"{path} is not there; all machines must see the checkpoints: put them on a file system they share")


def compare_data(data: PreparedData, ranks: Ranks) -> None:
    """Refuse ranks that read different data.

    Raises:
        ConfigError: one does not; the message names it.
    """
    found = ranks.objects((socket.gethostname(), data.train.fingerprint, data.eval and data.eval.fingerprint))
    for rank, (host, *fingerprints) in enumerate(found):
        if fingerprints != list(found[0][1:]):
            raise ConfigError(
                f"datasets: rank {rank} ({host}) reads other data than rank 0 ({found[0][0]}); give all the same files"
            )
