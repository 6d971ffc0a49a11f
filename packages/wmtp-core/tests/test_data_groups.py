"""Batches of documents that belong together: nothing lost, nothing twice, no group torn apart."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import tokenized_pair

from wmtp.config.schema import TrainDataConfig
from wmtp.data.base import Example
from wmtp.data.batch import PADDING
from wmtp.data.batches import StepBatches
from wmtp.data.dataset import TokenDataset
from wmtp.data.store import TokenStore
from wmtp.data.store_writer import StoreWriter
from wmtp.errors import ConfigError

layouts = st.fixed_dictionaries(
    {"packing": st.booleans(), "shuffle": st.booleans(), "batch_size": st.integers(3, 7), "max_length": st.integers(12, 24)}
)


def make_dataset(folder, lengths, **labels):
    writer = StoreWriter(folder, 1 << 16)
    for number, length in enumerate(lengths):
        own = {name: values[number] for name, values in labels.items()}
        writer.add(Example(id=f"d{number}", **own), tokenized_pair(list(range(length)), begin=0, prompt=1))
    writer.close([], 0)
    options = {"overlong": "truncate", "learn_prompt": False, "pad_id": 0, "max_length": 24}
    return TokenDataset([TokenStore(folder, "key")], names=["mine"], **options)


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(st.lists(st.integers(4, 12), min_size=1, max_size=3), min_size=1, max_size=25), layout=layouts)
def test_every_epoch_has_every_group_once_and_whole(groups, layout):
    numbers = np.array([group for group, members in enumerate(groups) for _ in members])
    lengths = [length for members in groups for length in members]
    shuffled = np.random.default_rng(0).permutation(len(numbers))
    numbers, lengths = numbers[shuffled], [lengths[i] for i in shuffled]
    left_out = np.random.default_rng(1).random(len(groups)) < 0.2
    left_out[numbers[0]] = False
    given_groups = np.where(left_out[numbers], -1, numbers * 7)
    with tempfile.TemporaryDirectory() as folder:
        batches = StepBatches(make_dataset(Path(folder), lengths), TrainDataConfig(**layout), seed=3, groups=given_groups)
        orders = []
        for epoch in range(2):
            seen = []
            for index in range(batches.steps_per_epoch):
                batch = batches.batch(epoch * batches.steps_per_epoch + index)
                assert 1 <= len(batch.input_ids) <= layout["batch_size"]
                assert batch.input_ids.shape[1] <= layout["max_length"]
                own = [document.index for document in batch.documents]
                assert sorted(torch.unique(batch.document[batch.document != PADDING]).tolist()) == list(range(len(own)))
                for number in set(numbers[own]):
                    assert set(np.flatnonzero(numbers == number)) <= set(own), "a group is torn apart"
                again = batches.batch(epoch * batches.steps_per_epoch + index)
                assert torch.equal(again.input_ids, batch.input_ids)
                seen += own
            assert sorted(seen) == sorted(np.flatnonzero(given_groups >= 0).tolist())
            orders.append(seen)
        if not layout["shuffle"]:
            assert orders[0] == orders[1]


def test_epochs_have_other_orders(folder):
    groups = np.arange(40) // 2
    batches = StepBatches(
        make_dataset(folder, [6] * 40), TrainDataConfig(batch_size=4, max_length=12, packing=False), seed=0, groups=groups
    )
    assert batches.steps_per_epoch == 10
    together = [
        {frozenset(d.index // 2 for d in batches.batch(epoch * 10 + i).documents) for i in range(10)} for epoch in range(2)
    ]
    assert all(len(pair) == 2 for pair in together[0])
    assert together[0] != together[1]


def test_single_groups_are_the_ordinary_batches_of_what_is_left(folder):
    dataset = make_dataset(folder, [5, 7, 9, 11, 6, 8])
    chosen = np.array([1, 0, 1, 1, 0, 1], bool)
    config = TrainDataConfig(batch_size=2, max_length=12, packing=False)
    ours = StepBatches(dataset, config, seed=1, groups=np.where(chosen, np.arange(6), -1))
    plain = StepBatches(dataset.select(chosen), config, seed=1)
    assert ours.steps_per_epoch == plain.steps_per_epoch
    for step in range(4):
        assert torch.equal(ours.batch(step).input_ids, plain.batch(step).input_ids)
    assert ours.fingerprint == dataset.fingerprint, "a resume compares the data itself"


@pytest.mark.parametrize("packing", [False, True])
def test_a_unit_that_needs_more_rows_than_a_batch_has(folder, packing):
    config = TrainDataConfig(batch_size=1, max_length=12, packing=packing)
    with pytest.raises(ConfigError, match=r"data.train.batch_size: 1, but the trainer wants documents in one step that need 2"):
        StepBatches(make_dataset(folder, [9, 9]), config, seed=0, groups=np.zeros(2, np.int64))


def test_labels_of_every_piece(folder):
    dataset = make_dataset(folder, [5, 7, 9], is_correct=[True, None, False], reward=[None, 0.5, -1.0], group=["a", "b", "a"])
    assert dataset.is_correct.tolist() == [1, -1, 0]
    assert dataset.rewards.tolist()[1:] == [0.5, -1.0]
    assert np.isnan(dataset.rewards[0])
    assert dataset.groups[0] == dataset.groups[2] != dataset.groups[1]
    assert dataset.sources.tolist() == [0, 0, 0]
    assert dataset.learned_lengths.tolist() == [4, 6, 8]
    assert dataset.document(0).document.source == "mine"
    fewer = dataset.select(np.array([False, True, True]))
    assert fewer.is_correct.tolist() == [-1, 0]


def test_a_group_belongs_to_one_source(folder):
    for name in "xy":
        (folder / name).mkdir()
    first, second = (make_dataset(folder / name, [5, 6], group=["a", "b"]) for name in "xy")
    stores = [first._stores[0], second._stores[0]]
    both = TokenDataset(stores, names=["x", "y"], overlong="truncate", learn_prompt=False, pad_id=0, max_length=24)
    assert len(set(both.groups.tolist())) == 4
    assert [both.document(i).document.source for i in range(4)] == ["x", "x", "y", "y"]
