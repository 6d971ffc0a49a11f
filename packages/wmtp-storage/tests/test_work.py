"""Division of bytes among workers: each is fetched once, however many workers there are and however slow some of them get."""

import os
import random
import threading
from datetime import UTC, datetime

import pytest

from wmtp_storage import work
from wmtp_storage.backend import StoredObject
from wmtp_storage.journal import Segment
from wmtp_storage.work import Part, Work


def part(tmp_path, size, name="x", **options):
    return Part(StoredObject(name, name, size, '"etag"', datetime.now(UTC)), tmp_path / name, **options)


@pytest.mark.parametrize("seed", range(8))
def test_every_byte_once(tmp_path, monkeypatch, seed):
    """Workers that take over the rest of a slow range write none of its bytes twice, and leave none out."""
    monkeypatch.setattr(work, "_SMALLEST", 7)
    monkeypatch.setattr(work, "_TOO_SLOW", 0.0)
    generator = random.Random(seed)
    parts = [part(tmp_path, generator.randrange(1, 400), str(number)) for number in range(6)]
    content = {each: generator.randbytes(each.stored.size) for each in parts}
    shared = Work(parts, generator.choice((10, 64, 1000)))
    last, guard = [], threading.Lock()

    def run(number):
        draw = random.Random(f"{seed} {number}")
        while (taken := shared.take(4)) is not None:
            while taken.position < taken.end:
                start, count = shared.reserve(taken, draw.randrange(1, 20))
                assert count >= 0
                taken.part.write(memoryview(content[taken.part])[start : start + count], start)
                with guard:
                    taken.part.segments.append(Segment(start, start + count, 0))
                if draw.random() < 0.3:
                    threading.Event().wait(0.0005)
            if shared.done(taken):
                with guard:
                    last.append(taken.part)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.left == 0
    assert shared.active == 0
    assert sorted(last, key=id) == sorted(parts, key=id), "of each file one worker was told that it had the last range"
    for each in parts:
        each.close()
        assert each.missing == []
        assert sum(segment.end - segment.start for segment in each.segments) == each.stored.size, "a byte came twice"
        assert each.path.read_bytes() == content[each]


def test_a_disk_that_takes_less_than_it_is_given(tmp_path, monkeypatch):
    written, real = part(tmp_path, 10), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: real(file, data[:3], position))
    written.write(memoryview(b"0123456789"), 0)
    written.close()
    assert written.path.read_bytes() == b"0123456789"


def test_what_is_missing(tmp_path):
    segments = [Segment(5, 7, 0), Segment(0, 2, 0)]
    assert part(tmp_path, 10, segments=segments).missing == [(2, 5), (7, 10)]
    assert part(tmp_path, 7, segments=segments).missing == [(2, 5)]
    assert part(tmp_path, 3, segments=[Segment(0, 2, 0), Segment(2, 3, 0)]).missing == []
    assert part(tmp_path, 0).missing == []
    assert part(tmp_path, 1).missing == [(0, 1)]


def test_a_file_without_ranges_begins_at_its_beginning(tmp_path):
    whole = part(tmp_path, 100, has_ranges=False)
    shared = Work([whole], 10)
    taken = shared.take(4)
    assert (taken.position, taken.end) == (0, 100)
    assert shared.take(4) is None, "nobody takes over half of it"
    shared.reserve(taken, 60)
    shared.restart(taken)
    assert (taken.position, shared.left) == (0, 100)
    shared.reserve(taken, 100)
    assert shared.done(taken)


def test_small_files_go_first(tmp_path):
    shared = Work([part(tmp_path, size, str(size)) for size in (50, 3, 20)], 100)
    assert [shared.take(1).end for _ in range(3)] == [3, 20, 50]
