"""Mixtures of data sets: shares of tokens, epochs of each, and any step made again the same."""

import numpy as np
import pytest
import torch
from prepared import tokenized_pair

from wmtp.config.load import load
from wmtp.config.rules import check_loaded
from wmtp.config.schema import TrainDataConfig
from wmtp.data.base import Example
from wmtp.data.batch import PADDING
from wmtp.data.batches import StepBatches
from wmtp.data.dataset import TokenDataset
from wmtp.data.store import TokenStore
from wmtp.data.store_writer import StoreWriter
from wmtp.errors import ConfigError

SHARES = {"a": 7.0, "b": 3.0}


def make_dataset(folder, lengths):
    """Data sets of documents of so many tokens."""
    stores = []
    for name, own in lengths.items():
        (folder / name).mkdir()
        writer = StoreWriter(folder / name, 1 << 16)
        for number, length in enumerate(own):
            example = Example(id=f"{name}{number}")
            writer.add(example, tokenized_pair(list(range(1, length + 1)), begin=0, prompt=1))
        writer.close([], 0)
        stores.append(TokenStore(folder / name, name))
    options = {"overlong": "truncate", "learn_prompt": False, "pad_id": 0, "max_length": 32}
    return TokenDataset(stores, names=list(lengths), **options)


def sizes():
    draw = np.random.default_rng(5)
    return {"a": draw.integers(3, 9, 40).tolist(), "b": draw.integers(10, 30, 50).tolist()}


def tokens_of(batch):
    """Tokens of each data set, and the documents' numbers."""
    found = dict.fromkeys(SHARES, 0)
    for number, document in enumerate(batch.documents):
        found[document.source] += int((batch.document == number).sum())
    assert sum(found.values()) == int((batch.document != PADDING).sum())
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_are_of_tokens_and_each_data_set_is_read_whole_before_it_begins_again(tmp_path, packing, shuffle):
    dataset = make_dataset(tmp_path, sizes())
    config = TrainDataConfig(max_length=32, batch_size=4, mixture=SHARES, packing=packing, shuffle=shuffle)
    batches = StepBatches(dataset, config, seed=1)
    total, seen = dict.fromkeys(SHARES, 0), {name: [] for name in SHARES}
    steps = 6 * batches.steps_per_epoch
    for step in range(steps):
        batch = batches.batch(step)
        assert len(batch.input_ids) <= 4
        for name, count in tokens_of(batch).items():
            total[name] += count
        if packing:  # a row is of one data set
            for row in batch.document:
                assert len({batch.documents[n].source for n in row.unique().tolist() if n != PADDING}) == 1
        for document in batch.documents:
            seen[document.source].append(document.index)
    assert total["a"] / sum(total.values()) == pytest.approx(0.7, abs=0.01)
    for name, count in (("a", 40), ("b", 50)):
        times = np.unique(seen[name], return_counts=True)[1]
        assert len(times) == count or len(seen[name]) < count
        # within an epoch of the mixture rows are in no order of passes, but no document is ahead by more than a pass
        assert times.max() - times.min() <= 1 + (not packing)
        share, epochs = batches.mixed(steps)[name]
        assert share == pytest.approx(SHARES[name] / 10)
        assert epochs == pytest.approx(len(seen[name]) / count, abs=0.15)


def test_every_part_of_an_epoch_has_about_the_shares(tmp_path):
    dataset = make_dataset(tmp_path, {"a": [32] * 300, "b": [32] * 100})
    batches = StepBatches(dataset, TrainDataConfig(max_length=32, batch_size=20, mixture=SHARES), seed=1)
    assert batches.steps_per_epoch == 20
    for step in range(60):
        assert tokens_of(batches.batch(step))["a"] / (20 * 32) == pytest.approx(0.7, abs=0.16)


@pytest.mark.parametrize("packing", [True, False])
def test_any_step_of_a_mixture_is_the_same_when_made_anew(tmp_path, packing):
    dataset = make_dataset(tmp_path, sizes())
    config = TrainDataConfig(max_length=32, batch_size=4, mixture=SHARES, packing=packing)
    straight = StepBatches(dataset, config, seed=3)
    steps = list(range(3 * straight.steps_per_epoch))
    made = [straight.batch(step) for step in steps]
    orders = {tuple(d.id for d in batch.documents) for batch in made}
    assert len(orders) > 0.9 * len(made)
    anew = StepBatches(dataset, config, seed=3)
    for step in reversed(steps):
        again = anew.batch(step)
        assert torch.equal(again.input_ids, made[step].input_ids)
        assert again.documents == made[step].documents
    other = StepBatches(dataset, config, seed=4).batch(0)
    assert [d.id for d in other.documents] != [d.id for d in made[0].documents]


def test_a_tiny_source_is_repeated_within_an_epoch(tmp_path):
    dataset = make_dataset(tmp_path, {"a": [5], "b": [32] * 20})
    batches = StepBatches(dataset, TrainDataConfig(max_length=32, batch_size=4, mixture={"a": 0.5, "b": 0.5}), seed=0)
    counts = [tokens_of(batches.batch(step)) for step in range(20 * batches.steps_per_epoch)]
    a, b = (sum(count[name] for count in counts) for name in SHARES)
    assert a / (a + b) == pytest.approx(0.5, abs=0.02)


def test_a_mixture_of_documents_that_belong_together_is_refused(tmp_path):
    dataset = make_dataset(tmp_path, {"a": [9, 9], "b": [9, 9]})
    config = TrainDataConfig(max_length=32, batch_size=4, mixture=SHARES)
    with pytest.raises(ConfigError, match=r"data\.train\.mixture: the trainer wants several documents in one step"):
        StepBatches(dataset, config, seed=0, groups=np.array([0, 0, 1, 1]))
    with pytest.raises(ConfigError, match=r"data\.train\.mixture\.b: no document of it is left"):
        StepBatches(dataset, config, seed=0, groups=np.array([0, 1, -1, -1]))
    assert StepBatches(dataset, config, seed=0, groups=np.arange(4)).steps_per_epoch == 1


BASE = {
    "models": {"base": {"type": "scratch", "vocab_size": 300}},
    "trainer": {"type": "baseline-mtp"},
    "datasets": {"a": {"type": "python-source"}, "b": {"type": "python-source", "max_length": 9}},
}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"train": {"mixture": {}}}, "data.train.mixture: names no data set; write each with its share"),
        ({"train": {"mixture": {"a": -1.0, "b": 2.0}}}, "data.train.mixture.a: -1 must be a finite number above 0"),
        ({"train": {"mixture": {"a": 0, "b": 0.0}}}, "data.train.mixture.b: 0 must be a finite number above 0"),
        ({"train": {"mixture": {"a": float("inf")}}}, "data.train.mixture.a: inf must be a finite number above 0"),
        (
            {"train": {"mixture": {"a": 1e308, "b": 1e308}}},
            "data.train.mixture: the shares add up to more than a number can hold",
        ),
        ({"train": {"mixture": {"a": 1, "c": 1}}}, "data.train.mixture: there is no [datasets.c]; there are: a, b"),
        ({"train": {"mixture": {"a": 1}, "sources": ["a"]}}, "data.train.mixture: conflicts with data.train.sources; remove"),
        ({"train": {"mixture": {"a": 1}}, "eval": {"sources": ["a"]}}, "data.eval.sources: 'a' is training data too"),
    ],
)
def test_mixtures_that_make_no_sense(data, problem):
    with pytest.raises(ConfigError) as error:
        check_loaded(load([BASE, {"data": data}]))
    assert any(problem in line for line in error.value.problems), error.value.problems


def test_a_mixture_that_makes_sense():
    check_loaded(load([BASE, {"data": {"train": {"mixture": {"a": 7, "b": 3}}, "eval": {"holdout": 0.1}}}]))
