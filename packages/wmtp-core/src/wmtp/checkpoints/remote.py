"""Checkpoints in an object store, uploaded while training continues.

They are written on this machine, and found again by another.

Importing this imports no torch: a run that was begun elsewhere is looked for before its place here is known.

Below ``checkpoints.uri`` are ``step-N/``, a checkpoint as it is on disk; ``step-N.json``, written after it, without which it
is none; ``run/``, the files of the run directory; and at the end ``model/``.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wmtp.checkpoints.manifest import check_files
from wmtp.config.places import build_backends
from wmtp.errors import ConfigError, WMTPError, described
from wmtp.json_files import DAMAGE
from wmtp.plugins.failures import plugin_failure
from wmtp.runs.files import UPLOADED_FILES
from wmtp.runs.step_file import merge_steps, set_aside_damaged
from wmtp.storage import Storage
from wmtp.storage.atomic import write_folder
from wmtp.storage.uris import backend_for, scheme_of, stored_files

if TYPE_CHECKING:
    from wmtp.checkpoints.local import Checkpoint
    from wmtp.config.schema import Config

__all__ = ["CheckpointUpload", "RemoteCheckpoints", "remote_checkpoints"]

logger = logging.getLogger("wmtp")

_MARKER: Final = re.compile(r"step-(\d+)\.json")
_UNFINISHED: Final = re.compile(r"step-(\d+)")
#: the name of a folder that a killed upload of another left beside its target
_LEFT: Final = re.compile(r".*\.partial-[0-9a-f]{16}")
#: seconds between two lines that say that the end of an upload is waited for
_SAYS_SO_EVERY: Final = 30.0


def remote_checkpoints(config: Config) -> RemoteCheckpoints | None:
    """Open the place that a run uploads checkpoints to, if any.

    None where they stay on this machine.

    Raises:
        ConfigError: nothing that is installed serves the URI.
    """
    uri = config.checkpoints.uri
    if uri is None or scheme_of(uri) == "file":
        return None
    return RemoteCheckpoints(backend_for(uri, build_backends(config.storage), key="checkpoints.uri"), uri)


class RemoteCheckpoints:
    """Checkpoints of one run at a URI.

    Args:
        storage: serves the URI.
        uri: ``checkpoints.uri``, of a scheme other than ``file``.
    """

    def __init__(self, storage: Storage, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._storage = storage

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints there, ascending.

        Raises:
            WMTPError: the store could not be asked.
        """
        return sorted(int(match[1]) for name in self._names() if (match := _MARKER.fullmatch(name)))

    def fetch(self, step: int, folder: Path) -> Checkpoint:
        """Bring a checkpoint to ``folder/step-N``, whole or not at all.

        Raises:
            WMTPError: it could not be read, or is not what was uploaded; the message names the URI.
        """
        from wmtp.checkpoints.local import Checkpoint

        target, uri = folder / f"step-{step}", f"{self.uri}/step-{step}"
        logger.info("fetching %s", uri)

        def write(partial: Path) -> None:
            written = self._written(step)
            self._storage.fetch(uri, partial)
            _check(partial, written, uri)
            try:
                check_files(partial)
            except (OSError, ValueError) as error:
                what = str(error).replace(f"{partial}/", "")
                raise WMTPError(
                    f"{uri} is damaged: {what}; remove {uri}.json to resume from the checkpoint before it"
                ) from error

        folder.mkdir(parents=True, exist_ok=True)
        write_folder(target, write)
        return Checkpoint(path=target, step=step)

    def fetch_run(self, run_dir: Path) -> None:
        """Copy the run files uploaded with the newest checkpoint into ``run_dir``.

        Raises:
            WMTPError: they could not be read.
        """
        self._storage.fetch(f"{self.uri}/{UPLOADED_FILES}", run_dir)

    def fetch_steps(self, run_dir: Path) -> None:
        """Fetch the step records that another machine has added to the run.

        Raises:
            WMTPError: they could not be read, or written.
        """
        with tempfile.TemporaryDirectory(prefix="wmtp-") as temporary:
            self.fetch_run(Path(temporary))
            for file in sorted(Path(temporary).glob("*.jsonl")):
                set_aside_damaged(run_dir / file.name)
                set_aside_damaged(file)
                merge_steps(run_dir / file.name, file)

    def _is_complete(self, step: int) -> bool:
        """Ask for a checkpoint's marker by its own name.

        What a listing does not show may be there all the same.
        """
        return any(True for _ in stored_files(self._storage, f"{self.uri}/step-{step}.json"))

    def _written(self, step: int) -> Mapping[str, int]:
        """Read the marker of a checkpoint: its files and their sizes.

        Raises:
            WMTPError: there is none, or what came is none.
        """
        uri = f"{self.uri}/step-{step}.json"
        with tempfile.TemporaryDirectory(prefix="wmtp-") as temporary:
            self._storage.fetch(uri, Path(temporary))
            content = Path(temporary, f"step-{step}.json").read_bytes()
        try:
            marker = json.loads(content)
            files = {str(name): int(size) for name, size in marker["files"].items()}
            if marker["step"] == step:
                return files
        except DAMAGE:
            pass
        raise WMTPError(f"{uri} is not what was uploaded: it begins with {content[:60].decode(errors='replace')!r}")

    def _names(self) -> set[str]:
        """List the names directly in the folder."""
        return {file.name.partition("/")[0] for file in stored_files(self._storage, self.uri)}

    def check_is_free(self) -> None:
        """Refuse a folder that holds another run or foreign files.

        A new run owns its folder, and replaces what lies there under its own names.

        Raises:
            ConfigError: another run's checkpoints are there, or files that no run wrote.
            WMTPError: the store could not be asked.
        """
        names = self._names()
        if any(map(_MARKER.fullmatch, names)):
            raise ConfigError(
                f"checkpoints.uri: {self.uri} holds checkpoints of another run; choose another folder, or resume that run"
            )
        # without a complete checkpoint these are of a run that was killed early
        foreign = sorted(n for n in names if n != UPLOADED_FILES and not _UNFINISHED.fullmatch(n) and not _LEFT.fullmatch(n))
        if foreign:
            shown = ", ".join(foreign[:5]) + (" …" if len(foreign) > 5 else "")
            raise ConfigError(f"checkpoints.uri: {self.uri} holds something else ({shown}); name a folder of this run alone")

    def tidy(self) -> None:
        """Remove what a killed run left half-uploaded.

        Only for the run that writes there. What belongs to a complete checkpoint stays: before anything is removed, its marker
        is asked for once more.

        Raises:
            WMTPError: it could not be removed, or the store contradicts itself.
        """
        self._storage.tidy(self.uri)
        names = self._names()
        for name in sorted(names):
            if (match := _UNFINISHED.fullmatch(name)) and f"{name}.json" not in names:
                if self._is_complete(int(match[1])):
                    raise WMTPError(
                        f"{self.uri}: the store lists {name} without {name}.json, which is there when it is asked for by name;"
                        " nothing of it was removed; run it again when the store gives one answer"
                    )
                self._storage.remove(f"{self.uri}/{name}")

    def upload(self, checkpoint: Checkpoint, run_dir: Path, keep_last: int, best: int | None = None) -> None:
        """Upload a checkpoint and the run's files; remove older ones.

        The checkpoint is complete once its marker is there. One that is there already, whole, is not touched: while it is
        replaced a kill would leave none.

        Args:
            checkpoint: on disk.
            run_dir: the run directory; the files in it go along, its folders do not.
            keep_last: how many checkpoints stay; 0 keeps all.
            best: the step of one that stays besides.

        Raises:
            WMTPError: it could not be uploaded; checkpoints that were there before still are.
        """
        name, sizes = checkpoint.path.name, _sizes(checkpoint.path)
        is_there = self._is_complete(checkpoint.step)
        if is_there and self._written(checkpoint.step) != sizes:
            self._storage.remove(f"{self.uri}/{name}.json")  # from here on it is no checkpoint
            is_there = False
        if not is_there:
            self._storage.push(checkpoint.path, f"{self.uri}/{name}")
        with tempfile.TemporaryDirectory(prefix="wmtp-") as temporary:
            for path in run_dir.iterdir():
                if path.is_file() and not path.name.startswith("."):
                    # a copy: the run still writes to some of them
                    copied = shutil.copyfile(path, Path(temporary, path.name))
                    self._storage.push(copied, f"{self.uri}/{UPLOADED_FILES}/{path.name}")
            marker = Path(temporary, f"{name}.json")
            marker.write_text(json.dumps({"step": checkpoint.step, "files": sizes}, indent=2) + "\n")
            self._storage.push(marker, f"{self.uri}/{marker.name}")
        steps = self.steps()
        if checkpoint.step not in steps:
            logger.warning("%s: the store does not list %s.json, which it has taken: older checkpoints stay", self.uri, name)
        elif keep_last:
            for step in steps[:-keep_last]:
                if step == best:
                    continue
                self._storage.remove(f"{self.uri}/step-{step}.json")  # from here on it is no checkpoint
                self._storage.remove(f"{self.uri}/step-{step}")

    def upload_model(self, model: Path) -> None:
        """Upload the trained model.

        Raises:
            WMTPError: it could not be uploaded.
        """
        self._storage.push(model, f"{self.uri}/{model.name}")


class CheckpointUpload:
    """Background upload of checkpoints, so that training never waits for the network.

    A checkpoint that is still waiting when a newer one is there is passed over, unless it is the best: the newer one serves as
    well. One that could not be uploaded is reported at once; the run fails at its end if the newest did not arrive.

    Args:
        remote: where to.
        run_dir: the run directory.
        keep_last: how many checkpoints stay there; 0 keeps all.
    """

    def __init__(self, remote: RemoteCheckpoints, run_dir: Path, keep_last: int) -> None:
        self._remote = remote
        self._run_dir = run_dir
        self._keep_last = keep_last
        self._waiting: list[Checkpoint] = []
        self._best: int | None = None
        self._under_way: Checkpoint | None = None
        self._failed: WMTPError | None = None
        self._changed = threading.Condition()
        self._closing = False
        # a daemon: a second Ctrl-C must end the process
        self._thread = threading.Thread(target=self._work, name="wmtp-upload", daemon=True)
        self._thread.start()

    def put(self, checkpoint: Checkpoint, *, is_best: bool = False) -> None:
        """Upload a checkpoint soon; returns at once.

        Args:
            checkpoint: on disk.
            is_best: it stays, there too, until a better one is there.
        """
        with self._changed:
            if is_best:
                self._best = checkpoint.step
            self._waiting = [*(one for one in self._waiting if one.step == self._best), checkpoint]
            self._changed.notify_all()

    @property
    def needed(self) -> set[int]:
        """Steps of the checkpoints on disk that must not be removed yet."""
        with self._changed:
            return {checkpoint.step for checkpoint in (*self._waiting, self._under_way) if checkpoint is not None}

    def restore_best(self, step: int | None, folder: Path) -> None:
        """Keep a resumed run's best checkpoint.

        It is fetched where it is in the store alone.

        Raises:
            WMTPError: it could not be fetched.
        """
        self._best = step
        if step is not None and not (folder / f"step-{step}").exists() and step in self._remote.steps():
            self._remote.fetch(step, folder)

    def finish(self, model: Path | None = None) -> None:
        """Wait for the last upload, then upload the model.

        However long it takes.

        Args:
            model: the trained model's folder; None where there is none.

        Raises:
            WMTPError: the newest checkpoint or the model did not arrive; the message says where it is on this machine.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        said = began = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.05)
            if time.monotonic() - said > _SAYS_SO_EVERY:
                said = time.monotonic()
                logger.info("waiting for the upload to %s (%d s)", self._remote.uri, said - began)
        if self._failed is not None:
            raise self._failed
        if model is not None:
            try:
                self._remote.upload_model(model)
            except WMTPError as error:
                raise WMTPError(f"the model was not uploaded: {error}; it is in {model}") from error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
                self._under_way = self._waiting.pop(0) if self._waiting else None
            if self._under_way is None:
                return
            self._failed = self._attempt(self._under_way)
            self._under_way = None

    def _attempt(self, checkpoint: Checkpoint) -> WMTPError | None:
        try:
            self._remote.upload(checkpoint, self._run_dir, self._keep_last, self._best)
        except Exception as error:
            reason = plugin_failure(error) or (error if isinstance(error, WMTPError | OSError) else described(error))
            failed = WMTPError(f"the checkpoint {checkpoint.path} was not uploaded to {self._remote.uri}: {reason}")
            failed.__cause__ = error
            logger.warning("%s; training continues", failed)
            return failed
        logger.info("uploaded %s/%s", self._remote.uri, checkpoint.path.name)
        return None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _check(folder: Path, written: Mapping[str, int], uri: str) -> None:
    """Verify that a fetched checkpoint has exactly the files that were uploaded."""
    found = _sizes(folder)
    for name in found.keys() - written.keys():
        if name.startswith("."):  # the manifest of what was fetched
            (folder / name).unlink()
            del found[name]
    if found != written:
        raise WMTPError(f"{uri} is not what was uploaded: it has the files {found}, but {written} were written")
