"""What ranks agree on, without processes: a rank whose messages are answered by a list."""

import pytest
import torch
from attrs import evolve, frozen

from wmtp.checkpoints.find import compare_data
from wmtp.data.batch import align_targets
from wmtp.distributed.ranks import ALONE, Ranks, Share
from wmtp.errors import ConfigError
from wmtp.testing.steps import random_step


@frozen(kw_only=True, eq=False)
class Answered(Ranks):
    """A rank that is told what the others said."""

    answers: list

    def objects(self, value):
        return self.answers


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_of_all_ranks_are_the_batch(world, rows):
    batch = random_step(3, packed=True, rows=4).batch.rows(0, rows)
    whole = align_targets(batch, 3)
    shares = [Share(ranks=evolve(ALONE, rank=rank, world=world), rows=rows) for rank in range(world)]
    own = [share.batch(batch) for share in shares]
    assert len({part.input_ids.shape for part in own}) == 1, "every rank computes as many rows"
    together = torch.cat([align_targets(part, 3).valid for part in own])
    assert torch.equal(together[:rows], whole.valid)
    assert not together[rows:].any(), "rows that fill up teach nothing"
    numbers = torch.arange(rows * 5, dtype=torch.float32).view(rows, 5) + 1
    taken = torch.cat([share.take(numbers) for share in shares])
    assert torch.equal(taken[:rows], numbers)
    assert not taken[rows:].any()


def test_a_rank_that_reads_other_data_is_named():
    class Data:
        def __init__(self, fingerprint):
            self.train = self
            self.eval = None
            self.fingerprint = fingerprint

    same = [("a", "x", None), ("b", "x", None)]
    compare_data(Data("x"), Answered(world=2, answers=same))
    with pytest.raises(ConfigError, match=r"rank 1 \(b\) reads other data than rank 0 \(a\)"):
        compare_data(Data("x"), Answered(world=2, answers=[same[0], ("b", "y", None)]))


def test_alone_nothing_is_said():
    assert ALONE.objects(3) == [3]
    assert ALONE.on_main(lambda: 4) == ALONE.together(lambda: 4) == ALONE.one_by_machine_first(lambda: 4) == 4
    assert ALONE.any(True)
    assert not ALONE.any(False)
    with pytest.raises(ZeroDivisionError):
        ALONE.together(lambda: 1 // 0)
