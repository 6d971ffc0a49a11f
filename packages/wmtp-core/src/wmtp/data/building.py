"""Resumable tokenization of a data set into a store."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from attrs import define, field

from wmtp.data.ahead import tokenized
from wmtp.data.base import BadExample, Example, ExampleLoader
from wmtp.data.example_checks import check_example, loader_files, loader_title
from wmtp.data.render import Renderer
from wmtp.data.store import TokenStore
from wmtp.data.store_writer import StoreWriter
from wmtp.errors import FileError, PluginError, WMTPError
from wmtp.storage.atomic import replace_text
from wmtp.storage.lock import FileLock

__all__ = ["Building", "bad_error", "stamps"]

_SHOWN: Final = 10
_ABANDONED_SECONDS: Final = 24 * 3600
_PROGRESS: Final = "progress.json"
#: so much work is lost at most where a build is killed
_PROGRESS_SECONDS: Final = 20.0
#: containers that are made and not freed again before Python looks for cycles: more than wait to be encoded
_COLLECTED_AFTER: Final = 500_000
_log = logging.getLogger("wmtp")


@define(kw_only=True, eq=False)
class Building:
    """Makes the store of a data set.

    Args:
        name: the data set's name, for messages.
        loader: yields its examples.
        path: the local place of its ``uri``.
        renderer: makes the documents.
        folder: of the store; its name is the key.
        on_bad_example: ``error`` or ``skip``.
    """

    name: str
    loader: ExampleLoader
    path: Path | None
    renderer: Renderer
    folder: Path
    on_bad_example: str
    _done: int = field(default=0, init=False)
    _bad: list[str] = field(factory=list, init=False)
    _bad_count: int = field(default=0, init=False)

    def build(self, before: Mapping[Path, tuple[int, ...]]) -> TokenStore:
        """Make the store, or wait for another process that makes it.

        Args:
            before: see `stamps`; taken before the files were read for the key.

        Raises:
            WMTPError: there is no example, a bad one, an unreadable file or one that has changed, or no space left.
        """
        with _writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.folder.parent)
            lock = FileLock(self.folder.parent / f".building-{self.folder.name}.lock")
            lock.acquire(waiting_for=f"tokenizes datasets.{self.name}")
        try:
            store = TokenStore.open_if_whole(self.folder, self.folder.name)
            return self._built(before) if store is None else store
        finally:
            lock.remove()

    def _built(self, before: Mapping[Path, tuple[int, ...]]) -> TokenStore:
        began = time.monotonic()
        building = self.folder.parent / f".building-{self.folder.name}"
        with _writing(self.folder):
            writer = self._resumed(building) or self._new(building)
        try:
            with _rare_collections():
                self._write(writer, building)
            if changed := _changed(before, stamps(self.loader, self.path)):
                raise WMTPError(f"datasets.{self.name}: {changed} has changed while it was read; run again once it is whole")
            with _writing(self.folder):
                (building / _PROGRESS).unlink(missing_ok=True)
                _publish(building, self.folder)
        except BaseException as error:
            if isinstance(error, Exception):  # Ctrl-C is no fault of what is there
                shutil.rmtree(building, ignore_errors=True)
            raise
        seconds = time.monotonic() - began
        _log.info("datasets.%s: %s tokens made in %.1f s, kept in %s", self.name, f"{writer.tokens:,}", seconds, self.folder)
        return TokenStore(self.folder, self.folder.name)

    def _new(self, building: Path) -> StoreWriter:
        _log.info("datasets.%s: tokenizing …", self.name)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        return StoreWriter(building, self.renderer.tokenizer.vocab_size)

    def _resumed(self, building: Path) -> StoreWriter | None:
        """Resume a killed build; None if there is none to resume."""
        try:
            state = json.loads((building / _PROGRESS).read_text(encoding="utf-8"))
            sizes = {name: (building / f"{name}.bin").stat().st_size for name in state["writer"]["sizes"]}
            if any(sizes[name] < size for name, size in state["writer"]["sizes"].items()):
                return None
            self._done, self._bad, self._bad_count = state["done"], state["bad"], state["bad_count"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if self._bad and self.on_bad_example == "error":
            self._done, self._bad, self._bad_count = 0, [], 0
            return None
        self.renderer.notes.restore(state["notes"])
        self.renderer.seen = self._done
        _log.info("datasets.%s: tokenizing, resumed after %s examples …", self.name, f"{self._done:,}")
        return StoreWriter(building, self.renderer.tokenizer.vocab_size, state["writer"])

    def _save(self, writer: StoreWriter, building: Path) -> None:
        state = {
            "done": self._done,
            "bad": self._bad,
            "bad_count": self._bad_count,
            "notes": self.renderer.notes.state(),
            "writer": writer.saved(),
        }
        replace_text(building / _PROGRESS, json.dumps(state))

    def _write(self, writer: StoreWriter, building: Path) -> None:
        saved = time.monotonic()
        stops = self.on_bad_example == "error"
        check = partial(check_example, self.name, self.loader)
        results = tokenized(self._examples(), self.renderer, check=check, stop_at_bad=stops)
        for result in results:
            self._done += 1
            if isinstance(result, BadExample):
                self._bad_count += 1
                if len(self._bad) < _SHOWN:
                    self._bad.append(str(result))
                if len(self._bad) == _SHOWN and stops:
                    break
                continue
            try:
                writer.add(*result)
                if time.monotonic() - saved > _PROGRESS_SECONDS and not (stops and self._bad):
                    self._save(writer, building)
                    saved = time.monotonic()
            except OSError as error:
                raise _not_written(building, error) from error
        with _writing(building):
            writer.close(self._bad, self._bad_count, self.renderer.notes.list())
        if self._bad and stops:
            raise bad_error(self.name, self._bad, self._bad_count)
        if not writer.documents:
            place = f" ({self.path})" if self.path else ""
            what = f"it gives no example{place}; it is empty, or its settings leave nothing of it"
            if self._bad:
                what = f"all {self._bad_count:,} examples are bad, the first: {self._bad[0]}"
            raise FileError(f"datasets.{self.name}: {what}")

    def _examples(self) -> Iterator[Example | BadExample]:
        examples = self.loader.examples(self.path)
        if not isinstance(examples, Iterable):
            title = loader_title(self.loader)
            raise PluginError(f"datasets.{self.name}: {title}: examples() returned {examples!r:.60}, not an iterator")
        return islice(examples, self._done, None)


def stamps(loader: ExampleLoader, path: Path | None) -> dict[Path, tuple[int, ...]]:
    """Note of each file what changes when its content does."""
    stamps = {}
    for file in loader_files(loader, path):
        try:
            found = file.stat()
        except OSError as error:
            raise FileError(f"{file}: cannot be read ({error})") from error
        stamps[file] = (found.st_size, found.st_mtime_ns, found.st_ino)
    return stamps


def _changed(before: Mapping[Path, tuple[int, ...]], after: Mapping[Path, tuple[int, ...]]) -> Path | None:
    """Find a file that is not what it was."""
    return next((file for file in {**before, **after} if before.get(file) != after.get(file)), None)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Run the garbage collector rarely.

    It would look through all documents that wait, which are freed without it.
    """
    before = gc.get_threshold()
    gc.set_threshold(_COLLECTED_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _not_written(folder, error) from error


def _not_written(folder: Path, error: OSError) -> WMTPError:
    reason = error.strerror or error
    return WMTPError(f"{folder.parent}: the token cache cannot be written ({reason}); free some space, or set data.cache_dir")


def _publish(building: Path, folder: Path) -> None:
    for _ in range(2):
        try:
            os.rename(building, folder)
            return
        except OSError:
            if not folder.exists():
                raise
            if TokenStore.open_if_whole(folder, folder.name) is not None:
                return  # another process was faster
        aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        with suppress(FileNotFoundError):  # another process has put the damaged one aside
            os.rename(folder, aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)
    raise WMTPError(f"{folder}: cannot be replaced; delete it")


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove leftovers of builds that were killed over a day ago."""
    for entry in cache_dir.glob(".building-*"):
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def bad_error(name: str, messages: Sequence[str], count: int) -> FileError:
    """Make the error of examples that cannot be read."""
    shown = "\n".join(f"  {message}" for message in messages)
    more = "" if count <= len(messages) and len(messages) < _SHOWN else "\n  … and maybe more"
    return FileError(
        f"datasets.{name}: examples cannot be read; repair them, or set data.train.on_bad_example = 'skip'\n{shown}{more}"
    )
