"""Growing file of JSON lines that resumes where it stopped. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wmtp.errors import ConfigError, WMTPError
from wmtp.json_files import read_json_object
from wmtp.storage.atomic import replace_text

__all__ = ["ResumableLines"]


class ResumableLines:
    """JSON lines with an ``index`` each, and a file of their settings.

    Args:
        path: the file. What is there is continued; a line that was cut off by a crash is removed.
        settings: what decides the lines. A file that was begun with others is refused.

    Raises:
        ConfigError: the file was made with other settings, or is none of these.
        WMTPError: it cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = path.with_name(f".{path.name}.settings.json")
        self.done: set[int] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._compare(settings)
                self._read()
            else:
                # before the first line, and whole: a file with lines always has its settings
                replace_text(self._settings, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise WMTPError(f"{path}: cannot be read or written ({error.strerror or error})") from error

    def _compare(self, settings: Mapping[str, Any]) -> None:
        if not self._settings.is_file():
            raise ConfigError(f"{self.path}: is there already, and not from this command; write to another file, or remove it")
        before = read_json_object(self._settings)
        for key in {**before, **settings}:
            if before.get(key) != settings.get(key):
                raise ConfigError(
                    f"{self.path}: was begun with {key} = {before.get(key)!r}, not {settings.get(key)!r}; use that again, "
                    "write to another file, or remove this one"
                )

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                self.done.add(int(json.loads(line)["index"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{self.path}:{number}: is no line of this command; write to another file") from error

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines, and have them on the disk.

        Raises:
            WMTPError: they could not be written.
        """
        found = list(lines)
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in found))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WMTPError(
                f"{self.path}: could not be written ({error.strerror or error}); run it again to continue"
            ) from error
        self.done.update(line["index"] for line in found)

    def finish(self) -> None:
        """Make an empty file where there are no lines."""
        self.path.touch()
