"""Agreement of ranks, without processes: a rank whose messages are answered by a list."""

import pytest
import torch
from attrs import evolve, frozen
from torch import nn

from wmtp.checkpoints.find import compare_data
from wmtp.config.load import load_config
from wmtp.config.schema import DevicesConfig, FsdpConfig
from wmtp.data.batch import align_targets
from wmtp.distributed.ranks import SINGLE_PROCESS, Ranks, Share
from wmtp.distributed.start import compare_processes
from wmtp.errors import ConfigError, PluginError
from wmtp.testing.steps import random_step
from wmtp.trainers import Trainer
from wmtp.trainers.setup import TrainerSetup
from wmtp.training.trainer_modules import set_up

CONFIG = {
    "models": {"base": {"type": "scratch", "vocab_size": 1024}},
    "tokenizer": {"type": "bytes"},
    "datasets": {"code": {"type": "python-source"}},
    "data": {"train": {"max_length": 8, "batch_size": 2}},
    "trainer": {"type": "baseline-mtp"},
}


@frozen(kw_only=True, eq=False)
class Answered(Ranks):
    """A rank that is told what the others said."""

    answers: list

    def objects(self, value):
        return self.answers


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_of_all_ranks_are_the_batch(world_size, rows):
    batch = random_step(3, packed=True, rows=4).batch.rows(0, rows)
    whole = align_targets(batch, 3)
    shares = [Share(ranks=evolve(SINGLE_PROCESS, rank=rank, world_size=world_size), rows=rows) for rank in range(world_size)]
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
    compare_data(Data("x"), Answered(world_size=2, answers=same))
    with pytest.raises(ConfigError, match=r"rank 1 \(b\) reads other data than rank 0 \(a\)"):
        compare_data(Data("x"), Answered(world_size=2, answers=[same[0], ("b", "y", None)]))


@frozen(kw_only=True, eq=False)
class Two(Ranks):
    """Rank 0 of two; rank 1 says the same, but of the modules in ``other``."""

    other: dict[str, list[object]]

    def objects(self, value):
        return [value, value | self.other if isinstance(value, dict) else value]


class Drawn(Trainer):
    def setup(self, setup):
        self.head = nn.Linear(3, 2)

    def modules(self):
        return {"head": self.head}


def set_up_after(draws, ranks):
    torch.rand(draws)  # as loading a model may, on rank 0 alone
    setup = TrainerSetup(
        hidden_size=3,
        vocab_size=9,
        horizon=2,
        device=torch.device("cpu"),
        seed=5,
        tokenizer=None,
        model=None,
        token_numbers=None,
    )
    state = torch.get_rng_state()
    modules = set_up(Drawn(), setup, "trainer 'drawn'", ranks)
    assert torch.equal(torch.get_rng_state(), state)
    return modules["head"].weight


def test_modules_of_a_trainer_are_drawn_alike_by_every_rank():
    weights = [set_up_after(draws, SINGLE_PROCESS) for draws in (0, 7)]
    assert torch.equal(*weights)
    with pytest.raises(PluginError, match=r"^trainer 'drawn': the module 'head' is not the same in every process; draw its"):
        set_up_after(0, Two(world_size=2, other={"head": []}))
    with pytest.raises(PluginError, match="the module 'of rank 1' is not the same in every process"):
        set_up_after(0, Two(world_size=2, other={"of rank 1": []}))


def test_hybrid_wants_as_many_processes_on_every_machine():
    def joined(strategy, *local_ranks):
        changed = evolve(load_config(CONFIG), devices=DevicesConfig(fsdp=FsdpConfig(strategy=strategy)))
        answers = [(f"host-{number}", local, {}) for number, local in enumerate(local_ranks)]
        return compare_processes(changed, Answered(world_size=len(local_ranks), answers=answers))

    assert joined("hybrid", 0, 1, 0, 1) == 2
    assert joined("full", 0, 1, 0) is None
    with pytest.raises(ConfigError, match=r"devices\.fsdp\.strategy: .* they have 2, 1; start as many on each"):
        joined("hybrid", 0, 1, 0)


def test_alone_nothing_is_said():
    assert SINGLE_PROCESS.objects(3) == [3]
    assert (
        SINGLE_PROCESS.main_only(lambda: 4)
        == SINGLE_PROCESS.collective(lambda: 4)
        == SINGLE_PROCESS.one_by_machine_first(lambda: 4)
        == 4
    )
    assert SINGLE_PROCESS.any(True)
    assert not SINGLE_PROCESS.any(False)
    with pytest.raises(ZeroDivisionError):
        SINGLE_PROCESS.collective(lambda: 1 // 0)
