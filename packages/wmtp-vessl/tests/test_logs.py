"""The log reader alone, against services that page in all the ways that services page."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_vessl.logs import LogReader

LINES = st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), max_size=40)


class Service:
    """A log that grows: times are exact, the order within a time is kept."""

    def __init__(self, *, newest, ends_inclusive, page):
        self.lines, self.newest, self.ends_inclusive, self.page_size = [], newest, ends_inclusive, page

    def page(self, start, end, limit):
        lines = sorted(self.lines, key=lambda line: line[0])
        lines = [x for x in lines if x[0] >= start and (end is None or x[0] < end or (self.ends_inclusive and x[0] == end))]
        limit = min(limit, self.page_size)
        lines = lines[max(0, len(lines) - limit) :] if self.newest else lines[:limit]
        return [{"timestamp": t, "message": m} for t, m in lines]


@settings(deadline=None, max_examples=200)
@given(
    batches=st.lists(LINES, max_size=6),
    newest=st.booleans(),
    inclusive=st.booleans(),
    limit=st.integers(2, 7),
    cap=st.sampled_from([3, 5, 10**6]),
)
def test_every_line_once_however_the_service_pages(batches, newest, inclusive, limit, cap):
    """Lines come late, share their time and their text, and are many more than a page, which may hold less than was asked for.

    A service that caps its pages cannot show more lines of one instant than a page holds.
    """
    if cap < 10**6:
        batches = [[(100 * n + i, m) for i, (_, m) in enumerate(batch)] for n, batch in enumerate(batches)]
    service = Service(newest=newest, ends_inclusive=inclusive, page=cap)
    reader = LogReader(service.page, limit=limit, overlap=10000)
    seen = []
    for batch in batches:
        service.lines += [(float(t), m) for t, m in batch]
        fresh = reader.new()
        expected = sorted(batch, key=lambda line: line[0])
        assert sorted(fresh) == sorted(m for _, m in expected)
        seen += fresh
    assert sorted(seen) == sorted(m for _, m in service.lines)
    assert reader.new() == []


@pytest.mark.parametrize("newest", [True, False])
def test_order_and_no_memory_of_old_lines(newest):
    service = Service(newest=newest, ends_inclusive=True, page=50)
    reader = LogReader(service.page, limit=50, overlap=10)
    service.lines = [(float(i // 7), f"line {i}") for i in range(1000)]
    assert reader.new() == [f"line {i}" for i in range(1000)]
    service.lines += [(150.0 + i, f"more {i}") for i in range(200)]
    assert reader.new() == [f"more {i}" for i in range(200)]
    assert len(reader._seen) < 20


def test_a_line_later_than_the_overlap_is_the_limit_of_what_can_be_known():
    service = Service(newest=True, ends_inclusive=True, page=50)
    reader = LogReader(service.page, overlap=10)
    service.lines = [(100.0, "a")]
    assert reader.new() == ["a"]
    service.lines += [(91.0, "late"), (80.0, "too late")]
    assert reader.new() == ["late"]


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, ["z"]), (3, ["x", "y", "z"]), (100, ["w", "w", "x", "y", "z"])])
@pytest.mark.parametrize("limit", [2, 1000])
def test_tail(count, expected, limit):
    service = Service(newest=True, ends_inclusive=True, page=1000)
    service.lines = [(1.0, "w"), (2.0, "w"), (2.0, "x"), (2.0, "y"), (3.0, "z")]
    reader = LogReader(service.page, limit=limit)
    assert reader.tail(count) == expected
    assert reader.new() == []
    service.lines += [(3.0, "z"), (4.0, "new")]
    assert reader.new() == ["z", "new"]


@pytest.mark.parametrize("newest", [True, False])
def test_a_service_that_caps_its_pages_below_what_is_asked_for(newest):
    service = Service(newest=newest, ends_inclusive=True, page=50)
    reader = LogReader(service.page)
    service.lines = [(float(i // 3), str(i)) for i in range(170)]
    assert reader.new() == [str(i) for i in range(170)]
    service.lines += [(60.0 + i / 10, str(i)) for i in range(170)]
    assert reader.new() == [str(i) for i in range(170)]


def test_lines_without_a_time_are_shown():
    pages = [[{"message": "a\n"}, {"message": "b", "timestamp": None}, {"timestamp": 1.5, "message": "c"}]]
    reader = LogReader(lambda *_: pages[0])
    assert reader.new() == ["a", "b", "c"]
    assert reader.new() == []
