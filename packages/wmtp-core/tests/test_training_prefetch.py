"""Batches made ahead: the same ones, in any order of asking, with errors where they belong."""

import threading

import pytest
import torch

from wmtp.data.batch import Batch
from wmtp.training.stages import Prefetcher


def make(step):
    shape = (1, 2)
    return Batch(
        input_ids=torch.full(shape, step),
        document=torch.zeros(shape, dtype=torch.int64),
        position=torch.arange(2).unsqueeze(0),
        loss_mask=torch.ones(shape, dtype=torch.bool),
        documents=(),
    )


class Source:
    def __init__(self, fails_at=None):
        self.asked, self.threads, self.fails_at = [], set(), fails_at

    def batch(self, step):
        self.asked.append(step)
        self.threads.add(threading.current_thread().name)
        if step == self.fails_at:
            raise ValueError(f"line {step} is bad")
        return make(step)


def numbers(ahead, steps):
    return [int(ahead.get(step).input_ids[0, 0]) for step in steps]


def test_every_step_gets_its_batch_made_once_and_none_beyond_the_end():
    source = Source()
    ahead = Prefetcher(source.batch, 7)
    assert numbers(ahead, range(7)) == list(range(7))
    ahead.close()
    assert source.asked == list(range(7))
    assert threading.current_thread().name not in source.threads


def test_a_start_in_the_middle_and_a_jump_give_the_right_batches():
    ahead = Prefetcher(Source().batch, 100)
    assert numbers(ahead, [41, 42, 7, 8, 99, 99, 120, 3]) == [41, 42, 7, 8, 99, 99, 120, 3]
    ahead.close()


def test_no_more_than_the_depth_is_made_ahead():
    source = Source()
    ahead = Prefetcher(source.batch, 100, depth=2)
    ahead.get(0)
    ahead.close()
    assert max(source.asked) <= 2


def test_an_error_is_raised_at_its_own_step_and_again_if_asked_again():
    ahead = Prefetcher(Source(fails_at=2).batch, 10)
    assert numbers(ahead, [0, 1]) == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="line 2 is bad"):
            ahead.get(2)
    assert numbers(ahead, [3]) == [3]
    ahead.close()


def test_closing_ends_the_thread_even_while_batches_are_made():
    ahead = Prefetcher(Source().batch, 10**6)
    ahead.get(0)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wmtp-batches")]


def test_what_was_made_is_made_again_when_the_plan_has_changed():
    plan = [0]
    ahead = Prefetcher(lambda step: make(step + plan[0]), 10)
    assert numbers(ahead, [0, 1]) == [0, 1]
    plan[0] = 50
    ahead.forget()
    assert numbers(ahead, [2, 3]) == [52, 53]
    ahead.close()
