import logging
import threading

import pytest

from wmtp.tracking.sender import Sender


class Receiver:
    """Takes numbers, unless it is told to be away; everything waits on events, never on time."""

    def __init__(self):
        self.got = []
        self.away = False
        self.failed = threading.Event()
        self.arrived = threading.Event()
        self.held = threading.Event()
        self.held.set()

    def __call__(self, items):
        assert self.held.wait(300)
        if self.away:
            self.failed.set()
            raise ConnectionError("nobody there")
        for item in items:
            if item < 0:
                raise ValueError("negative")
        self.got.extend(items)
        self.arrived.set()


@pytest.fixture
def receiver():
    return Receiver()


@pytest.fixture
def sender(receiver):
    return Sender(
        receiver,
        refused=lambda error: isinstance(error, ValueError),
        reason=str,
        receiver="the receiver",
        batch=3,
        interval=0.0,
    )


def test_order_and_batches(sender, receiver):
    for start in range(0, 100, 10):
        sender.put(range(start, start + 10))
    assert sender.close(300) == 0
    assert receiver.got == list(range(100))


def test_put_returns_while_a_send_hangs(sender, receiver):
    receiver.held.clear()
    for number in range(1000):
        sender.put([number])
    assert receiver.got == []
    receiver.held.set()
    assert sender.close(300) == 0
    assert receiver.got == list(range(1000))


def test_nothing_is_lost_while_away_and_it_is_said_once(sender, receiver, caplog, monkeypatch):
    monkeypatch.setattr("wmtp.tracking.sender._FIRST_DELAY", 0.01)  # before it tries again
    caplog.set_level(logging.INFO, "wmtp")
    receiver.away = True
    sender.put([0, 1, 2, 3, 4])
    assert receiver.failed.wait(300)
    receiver.failed.clear()
    assert receiver.failed.wait(300), "it tries again"
    sender.put([5])
    receiver.away = False
    assert receiver.arrived.wait(300)
    assert sender.close(300) == 0
    assert receiver.got == [0, 1, 2, 3, 4, 5]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("the receiver is away: nobody there; ")
    assert messages[1] == "the receiver is back; what it missed is being sent"


def test_close_gives_up_and_counts(sender, receiver):
    receiver.away = True
    sender.put([0, 1, 2, 3, 4])
    assert sender.close(0.2) == 5


def test_close_gives_up_while_a_send_hangs(sender, receiver):
    receiver.held.clear()
    sender.put([1])
    assert sender.close(0.1) == 1
    receiver.held.set()


def test_close_tries_again_at_once(sender, receiver):
    receiver.away = True
    sender.put([1])
    assert receiver.failed.wait(300)
    receiver.away = False
    assert sender.close(300) == 0
    assert receiver.got == [1]


def test_what_is_refused_is_dropped_and_said_once(sender, receiver, caplog):
    sender.put([1, 2, 3])
    sender.put([-1, 5, 6])
    sender.put([-1, 8, 9])
    sender.put([10])
    assert sender.close(300) == 0
    assert receiver.got[:3] == [1, 2, 3]
    assert receiver.got[-1] == 10
    assert [record.getMessage() for record in caplog.records] == [
        "the receiver refuses metrics: negative; training continues, and metrics.jsonl has everything"
    ]
