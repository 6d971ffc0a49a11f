"""The journal by itself: what of a transfer counts after a kill."""

import pytest
from awscrt.checksums import crc64nvme

from wmtp_storage.journal import Journal, Kept, Segment, read_journal, whole_checksum

PARTS = [Segment(0, 3, crc64nvme(b"abc")), Segment(3, 4, crc64nvme(b"d")), Segment(4, 9, crc64nvme(b"efghi"))]


def test_what_was_noted_is_read(tmp_path):
    journal = Journal(tmp_path / "journal", {"a": Kept(9, "one", PARTS[:1])})
    journal.add("a", PARTS[2])
    journal.add_file("b", 4, "two")
    journal.add("b", PARTS[0])
    journal.close()
    assert read_journal(tmp_path / "journal") == {"a": Kept(9, "one", [PARTS[0], PARTS[2]]), "b": Kept(4, "two", PARTS[:1])}
    assert read_journal(tmp_path / "none") == {}


def test_a_file_that_is_begun_again_has_nothing_of_before(tmp_path):
    """It was damaged on its way: not one of its bytes may count, also not for who resumes."""
    journal = Journal(tmp_path / "journal", {"a": Kept(9, "one", list(PARTS))})
    journal.add_file("a", 9, "one")
    journal.add("a", PARTS[1])
    journal.close()
    assert read_journal(tmp_path / "journal") == {"a": Kept(9, "one", [PARTS[1]])}


def test_lines_that_are_damaged_are_passed_over(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, {"a": Kept(9, "one", [])})
    for part in PARTS:
        journal.add("a", part)
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join(
            [lines[0], b"\0\0\0\n", b"[1]\n", b"7\n", b'{"of": 5, "range": [0, 1], "crc": "0"}\n', *lines[1:3], lines[3][:-9]]
        )
    )
    assert read_journal(path) == {"a": Kept(9, "one", PARTS[:2])}


def test_the_checksum_of_a_whole_file_from_its_parts():
    assert whole_checksum(reversed(PARTS)) == crc64nvme(b"abcdefghi")
    assert whole_checksum([]) == 0
    for wrong in (PARTS[1:], [PARTS[0], PARTS[2]], [PARTS[0], PARTS[0], *PARTS[1:]]):
        with pytest.raises(ValueError, match="gap or an overlap"):
            whole_checksum(wrong)
