"""``checkpoint.json``: a checkpoint's files and their checksums. Imports no torch.

Sizes and CRC-32, which finds any single flipped bit or damaged run of up to 32; it is for disks and lines that err, not against
people who want to deceive. Reading runs at several GB/s on each core (docs/performance.md), several files at once.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from wmtp.errors import WMTPError
from wmtp.json_files import DAMAGE
from wmtp.storage.manifest import ManifestFile, hash_file, verify

__all__ = ["check_files", "hash_files", "write_facts"]

_NAME: Final = "checkpoint.json"
_FORMAT: Final = 1
_THREADS: Final = 8


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """Compute the checksum of each file.

    Args:
        folder: a checkpoint's.
        names: of files in it.
    """
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name, "crc32"), names), strict=True))


def write_facts(folder: Path, step: int, hashes: Mapping[str, str]) -> None:
    """Write ``checkpoint.json``, after all other files.

    Args:
        folder: the checkpoint's.
        step: optimizer steps done.
        hashes: what `hash_files` gave of files in it. Those of the others are made here.
    """
    names = sorted(path.name for path in folder.iterdir())
    known = {**hash_files(folder, [name for name in names if name not in hashes]), **hashes}
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "step": step,
        "files": {name: (folder / name).stat().st_size for name in names},
        "hashes": {name: known[name] for name in names},
    }
    facts["hash"] = _own_hash(facts)
    (folder / _NAME).write_text(json.dumps(facts, indent=2) + "\n")


def check_files(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Verify that the files are as written; ranks share the work.

    Checkpoints of earlier versions have sizes only.

    Args:
        folder: the checkpoint's.
        rank: of this process.
        world_size: how many there are.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
        OSError: one cannot be read.
        WMTPError: the checkpoint is of another version.
    """
    path = folder / _NAME
    try:
        facts = json.loads(path.read_text())
        is_old = "hash" not in facts and "hashes" not in facts
        if not is_old and facts.pop("hash") != _own_hash(facts):
            raise ValueError("its content was changed or damaged")
        if facts["format"] != _FORMAT:
            raise WMTPError(f"{folder}: format {facts['format']}, but this version of wmtp reads format {_FORMAT}")
        sizes = facts["files"]
        hashes = dict.fromkeys(sizes) if is_old else facts["hashes"]
        files = [ManifestFile(name=name, size=sizes[name], hash=hashes[name] or "") for name in sorted(sizes)]
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if problems := verify(folder, files[rank::world_size]):
        raise ValueError("; ".join(problems[:5]))


def _own_hash(facts: Mapping[str, Any]) -> str:
    return f"crc32:{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"
