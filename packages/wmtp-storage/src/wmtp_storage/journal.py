"""Journal of a transfer's bytes on disk, which survives a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from attrs import define, field, frozen
from awscrt.checksums import combine_crc64nvme

__all__ = ["Journal", "Kept", "Segment", "read_journal", "whole_checksum"]


@frozen
class Segment:
    """A stretch of a file that was received and written.

    Args:
        start: its first byte.
        end: the byte after its last.
        crc: CRC-64/NVME of it.
    """

    start: int
    end: int
    crc: int


@define
class Kept:
    """Record of one file in the journal.

    Args:
        size: bytes of the object.
        identity: of the object version that the bytes belong to.
        segments: the written ranges.
    """

    size: int
    identity: str
    segments: list[Segment] = field(factory=list)


class Journal:
    """Journal in lines of JSON.

    A line that a kill cut off is not read; what it spoke of is fetched again. A segment's line is written after its bytes.
    Should the machine itself lose power, the bytes of a line may be missing: a resume reads them, and compares their checksum.

    Args:
        path: the file; it is replaced.
        kept: earlier records that are continued.
    """

    def __init__(self, path: Path, kept: Mapping[str, Kept]) -> None:
        draft = path.with_suffix(".new")
        self._numbers: dict[str, int] = {}
        self._descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        for name, state in kept.items():
            self.add_file(name, state.size, state.identity)
            for segment in state.segments:
                self.add(name, segment)
        draft.replace(path)

    def add_file(self, name: str, size: int, identity: str) -> None:
        """Begin a file; earlier entries of this name no longer count."""
        number = self._numbers[name] = len(self._numbers)
        self._write({"file": number, "name": name, "size": size, "identity": identity})

    def add(self, name: str, segment: Segment) -> None:
        """Note that a segment is written."""
        self._write({"of": self._numbers[name], "range": [segment.start, segment.end], "crc": f"{segment.crc:016x}"})

    def close(self) -> None:
        """Close the journal."""
        os.close(self._descriptor)

    def _write(self, line: Mapping[str, object]) -> None:
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")


def read_journal(path: Path) -> dict[str, Kept]:
    """Read a journal's record of each file; empty where there is none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    files: dict[int, Kept] = {}
    names: dict[int, str] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if "file" in entry:
                names[entry["file"]] = entry["name"]
                files[entry["file"]] = Kept(entry["size"], entry["identity"])
            else:
                start, end = entry["range"]
                files[entry["of"]].segments.append(Segment(start, end, int(entry["crc"], 16)))
        except (ValueError, KeyError, TypeError):  # cut off
            continue
    # the last of several files with one name counts
    return {names[number]: kept for number, kept in files.items()}


def whole_checksum(segments: Iterable[Segment]) -> int:
    """Combine the CRC-64/NVME of segments to that of their file.

    Segments may be in any order; they must cover the file without gap or overlap.
    """
    whole, position = 0, 0
    for segment in sorted(segments, key=lambda segment: segment.start):
        if segment.start != position:
            raise ValueError(f"the segments have a gap or an overlap at byte {position}")
        whole = combine_crc64nvme(whole, segment.crc, segment.end - segment.start)
        position = segment.end
    return whole
