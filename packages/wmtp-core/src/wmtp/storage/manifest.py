"""Record of what was fetched into a folder: ``.wmtp-manifest.json``.

Its checksums tell later whether that is still so.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import attrs
from attrs import frozen

from wmtp.cores import usable_cores
from wmtp.errors import FileError, WMTPError
from wmtp.json_files import DAMAGE

__all__ = ["MANIFEST", "Manifest", "ManifestFile", "hash_file", "verify"]

#: its name in the folder
MANIFEST: Final = ".wmtp-manifest.json"

_VERSION = 1
_BLOCK = 2**22  # bytes read at once


@frozen(kw_only=True)
class ManifestFile:
    """One file.

    Args:
        name: its path in the folder, with ``/``.
        size: bytes.
        hash: ``ALGORITHM:HEX`` of its content; empty where only the size is known.
        etag: what the store called this version of it; None where it has no name for it.
        checked: the store's own checksum that the content was compared with; None where the store has none.
    """

    name: str
    size: int
    hash: str
    etag: str | None = None
    checked: str | None = None


@frozen(kw_only=True)
class Manifest:
    """Record of fetched files.

    Args:
        uri: the source, without secrets.
        files: by name.
    """

    uri: str
    files: tuple[ManifestFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps({"version": _VERSION, **attrs.asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write it; the file appears whole."""
        draft = path.with_name(f"{path.name}.partial-{os.getpid()}")
        draft.write_text(self.dumps(), encoding="utf-8")
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)

    @classmethod
    def loads(cls, text: str | bytes, where: object) -> Manifest:
        """Read one.

        Args:
            text: JSON.
            where: what messages call it.

        Raises:
            WMTPError: it is damaged, or of a later version of WMTP.
        """
        try:
            table: dict[str, Any] = json.loads(text)
            if table.pop("version") != _VERSION:
                raise WMTPError(f"{where} was written by another version of WMTP; fetch again")
            files = tuple(ManifestFile(**file) for file in table.pop("files"))
            return cls(files=files, **table)
        except DAMAGE as error:
            raise FileError(f"{where} is damaged; fetch again") from error

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """Read one; None where there is none. Raises as `loads`."""
        try:
            return cls.loads(path.read_bytes(), path)
        except (FileNotFoundError, NotADirectoryError):
            return None


def hash_file(path: Path, algorithm: str) -> str:
    """``ALGORITHM:HEX`` of a file.

    Args:
        path: the file.
        algorithm: ``crc32``, ``crc64nvme``, or what `hashlib` has.

    Raises:
        WMTPError: the algorithm is not available here.
        OSError: the file cannot be read.
    """
    if algorithm == "crc32":
        return f"{algorithm}:{_rolling(path, zlib.crc32):08x}"
    if algorithm == "crc64nvme":
        return f"{algorithm}:{_rolling(path, _crc64nvme(path)):016x}"
    try:
        with path.open("rb") as file:
            return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
    except ValueError:
        raise WMTPError(
            f"{path}: its checksum is of the kind {algorithm!r}, which this version of WMTP does not know"
        ) from None


def _crc64nvme(path: Path) -> Callable[[memoryview, int], int]:
    try:
        from awscrt.checksums import crc64nvme
    except ImportError:
        raise WMTPError(f"{path}: its checksum is made by the package awscrt; install the package wmtp-storage") from None
    return crc64nvme  # type: ignore[return-value]  # it takes any buffer


def _rolling(path: Path, update: Callable[[memoryview, int], int]) -> int:
    value = 0
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = update(buffer[:count], value)
    return value


def verify(folder: Path, files: Iterable[ManifestFile]) -> list[str]:
    """Compare files with what the manifest says of them, several at once.

    Args:
        folder: where they are.
        files: what they should be.

    Returns:
        One line for each file that is missing or differs.
    """

    def problem(file: ManifestFile) -> str | None:
        path = folder / file.name
        try:
            if path.stat().st_size != file.size:
                return f"{path}: has {path.stat().st_size} bytes in place of {file.size}"
            found = hash_file(path, file.hash.partition(":")[0]) if file.hash else ""
        except FileNotFoundError:
            return f"{path}: is missing"
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror}"
        return None if found == file.hash else f"{path}: its content was changed or damaged"

    with ThreadPoolExecutor(max_workers=min(8, usable_cores())) as pool:
        return [line for line in pool.map(problem, files) if line is not None]
