"""Rows and batches: nothing lost, nothing twice, nothing predicted across documents, and any step made again the same."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import tokenized_pair

from wmtp.config.schema import DataConfig, EvalDataConfig, TrainDataConfig
from wmtp.data.base import Example
from wmtp.data.batch import PADDING, Batch, align_targets
from wmtp.data.batches import EvalBatches, StepBatches
from wmtp.data.dataset import TokenDataset
from wmtp.data.packing import best_fit, in_order
from wmtp.data.store import STORE_INFO, TokenStore
from wmtp.data.store_writer import StoreWriter
from wmtp.data.tokenized import CONTEXT, LEARNED
from wmtp.errors import WMTPError

EOS, BOS, FIRST = 0, 1, 2


def make_dataset(folder, documents, *, bos=True, weights=False, vocab_size=1 << 16, **options):
    """A data set of documents given as (prompt length, completion length); every token of text has an id of its own."""
    writer = StoreWriter(Path(folder), vocab_size)
    token = FIRST
    for number, (prompt, completion) in enumerate(documents):
        text = list(range(token, token + prompt + completion))
        token += prompt + completion
        tokens = [BOS] * bos + text + [EOS]
        own = [float(t) for t in tokens] if weights and number % 2 else None
        writer.add(
            Example(id=f"d{number}", group=f"g{number // 2}"),
            tokenized_pair(tokens, begin=bos, prompt=prompt, weights=own),
        )
    writer.close([], 0)
    given_options = {"max_length": 16, "overlong": "truncate", "learn_prompt": False, "pad_id": EOS}
    return TokenDataset([TokenStore(Path(folder), "key")], **given_options | options)


ragged = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=30).filter(
    lambda documents: any(sum(lengths) > 1 and lengths[0] < 8 for lengths in documents)
)
layouts = st.fixed_dictionaries(
    {
        "packing": st.booleans(),
        "shuffle": st.booleans(),
        "overlong": st.sampled_from(["truncate", "split"]),
        "learn_prompt": st.booleans(),
        "batch_size": st.integers(1, 5),
        "max_length": st.integers(12, 24),
    }
)


def pieces_of(batch):
    """The pieces in a batch by a plain loop: (document, its tokens, learn flags, positions), row by row."""
    found = []
    for row in range(batch.input_ids.shape[0]):
        place = 0
        length = batch.input_ids.shape[1]
        while place < length:
            number = int(batch.document[row, place])
            start = place
            while place < length and int(batch.document[row, place]) == number:
                place += 1
            if number != PADDING:
                at = (row, slice(start, place))
                found.append(
                    (
                        batch.documents[number],
                        batch.input_ids[at].tolist(),
                        batch.loss_mask[at].tolist(),
                        batch.position[at].tolist(),
                    )
                )
    return found


def epoch_of(batches, epoch):
    steps = batches.steps_per_epoch
    return [batches.batch(epoch * steps + index) for index in range(steps)]


@settings(max_examples=60, deadline=None)
@given(documents=ragged, layout=layouts, bos=st.booleans(), seed=st.integers(0, 5))
def test_every_token_comes_once_in_every_epoch(documents, layout, bos, seed):
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(
            folder, documents, bos=bos, **{key: layout[key] for key in ("max_length", "overlong", "learn_prompt")}
        )
        if not len(dataset):
            return
        expected = sorted(
            (d.document.index, d.document.start, d.tokens.tolist()) for d in map(dataset.document, range(len(dataset)))
        )
        batches = StepBatches(dataset, TrainDataConfig(**layout), seed=seed)
        for epoch in (0, 1):
            seen = epoch_of(batches, epoch)
            found = [piece for batch in seen for piece in pieces_of(batch)]
            assert sorted((document.index, document.start, tokens) for document, tokens, _, _ in found) == expected
            assert all(positions == list(range(len(positions))) for _, _, _, positions in found)
            assert [len(batch.input_ids) for batch in seen[:-1]] == [layout["batch_size"]] * (len(seen) - 1)
            for batch in seen:
                padding = batch.document == PADDING
                assert batch.input_ids.shape[1] <= layout["max_length"]
                assert not batch.loss_mask[padding].any()
                assert (batch.input_ids[padding] == EOS).all()
                assert batch.packed <= layout["packing"]


@settings(max_examples=60, deadline=None)
@given(documents=ragged, layout=layouts, bos=st.booleans(), horizon=st.integers(1, 6))
def test_no_head_predicts_across_a_documents_end(documents, layout, bos, horizon):
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(
            folder, documents, bos=bos, **{key: layout[key] for key in ("max_length", "overlong", "learn_prompt")}
        )
        if not len(dataset):
            return
        for batch in epoch_of(StepBatches(dataset, TrainDataConfig(**layout), seed=0), 0):
            targets = align_targets(batch, horizon)
            expected = set()
            rows, length = batch.input_ids.shape
            for row in range(rows):
                for t in range(length):
                    for k in range(1, horizon + 1):
                        if t + k >= length or batch.document[row, t] == PADDING:
                            continue
                        crossed = any(batch.document[row, t] != batch.document[row, j] for j in range(t, t + k + 1))
                        if not crossed and batch.loss_mask[row, t + k]:
                            expected.add((row, t, k, int(batch.input_ids[row, t + k])))
            found = {
                (row, t, k + 1, int(targets.ids[row, t, k]))
                for row, t, k in zip(*(axis.tolist() for axis in torch.where(targets.valid)), strict=True)
            }
            assert found == expected


@settings(max_examples=40, deadline=None)
@given(documents=ragged, bos=st.booleans(), learn_prompt=st.booleans())
def test_the_end_is_learned_and_the_prompt_is_not(documents, bos, learn_prompt):
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder, documents, bos=bos, learn_prompt=learn_prompt, max_length=64)
        for number in range(len(dataset)):
            piece = dataset.document(number)
            prompt, completion = documents[piece.document.index]
            assert piece.tokens[-1] == EOS
            assert piece.loss_mask.tolist() == [False] * bos + [learn_prompt] * prompt + [True] * (completion + 1)
        learned = sum(int(dataset.document(number).loss_mask[1:].sum()) for number in range(len(dataset)))
        assert learned == dataset.learned_tokens


def test_an_overlong_document_is_truncated_skipped_or_split(tmp_path):
    documents = [(2, 3), (3, 30), (20, 4)]

    def made(name, overlong):
        folder = tmp_path / name
        folder.mkdir()
        dataset = make_dataset(folder, documents, max_length=16, overlong=overlong)
        pieces = [dataset.document(number) for number in range(len(dataset))]
        return dataset, [(piece.document.index, piece.document.start, len(piece.tokens)) for piece in pieces], pieces

    dataset, cut, pieces = made("truncate", "truncate")
    assert cut == [(0, 0, 7), (1, 0, 16)]  # of document 2 only prompt is left
    assert EOS not in pieces[1].tokens  # it does not end there
    assert (dataset.counts.truncated, dataset.counts.without_target) == (2, 1)

    dataset, cut, _ = made("skip", "skip")
    assert cut == [(0, 0, 7)]
    assert dataset.counts.overlong == 2

    dataset, cut, pieces = made("split", "split")
    # 35 tokens in 16 + 16 + 3, and 26 in 16 + 10; the first part of document 2 is all prompt
    assert cut == [(0, 0, 7), (1, 0, 16), (1, 16, 16), (1, 32, 3), (2, 16, 10)]
    assert pieces[3].tokens[-1] == EOS
    assert pieces[4].loss_mask.tolist() == [False] * 5 + [True] * 5
    assert (dataset.counts.split, dataset.counts.without_target) == (2, 1)


def test_documents_of_one_token_are_left_out(tmp_path):
    dataset = make_dataset(tmp_path, [(0, 1), (0, 0), (1, 1), (0, 2)])
    assert dataset.indices.tolist() == [2, 3]
    assert dataset.counts.without_target == 2


@pytest.mark.parametrize("packing", [True, False])
def test_any_step_is_the_same_when_made_anew(tmp_path, packing):
    documents = [(n % 5, 2 + n * 7 % 11) for n in range(60)]
    dataset = make_dataset(tmp_path, documents)
    config = TrainDataConfig(max_length=16, batch_size=4, packing=packing)
    straight = StepBatches(dataset, config, seed=3)
    steps = straight.total_steps(3)
    seen = [straight.batch(step).input_ids.tolist() for step in range(steps)]
    for step in (steps - 1, 0, steps // 2):
        again = StepBatches(dataset, config, seed=3)
        assert again.batch(step).input_ids.tolist() == seen[step]
    per_epoch = straight.steps_per_epoch
    assert seen[:per_epoch] != seen[per_epoch : 2 * per_epoch]
    assert [StepBatches(dataset, config, seed=4).batch(step).input_ids.tolist() for step in range(per_epoch)] != seen[
        :per_epoch
    ]
    assert straight.locate(per_epoch + 2) == (1, 2)
    assert straight.total_steps(0.5) == -(-per_epoch // 2)
    assert straight.total_steps(1e-9) == 1


@pytest.mark.parametrize("packing", [True, False])
def test_without_shuffling_the_order_is_that_of_the_files(tmp_path, packing):
    dataset = make_dataset(tmp_path, [(1, 2 + n * 7 % 11) for n in range(30)])
    batches = StepBatches(dataset, TrainDataConfig(max_length=16, batch_size=4, packing=packing, shuffle=False), seed=0)
    for epoch in (0, 1):
        order = [document.index for batch in epoch_of(batches, epoch) for document, *_ in pieces_of(batch)]
        assert order == list(range(30))


def test_padded_rows_of_a_batch_are_of_like_length(tmp_path):
    random = np.random.default_rng(0)
    documents = [(0, int(n)) for n in random.integers(2, 120, size=400)]
    dataset = make_dataset(tmp_path, documents, max_length=128)
    batches = StepBatches(dataset, TrainDataConfig(max_length=128, batch_size=8, packing=False), seed=0)
    seen = epoch_of(batches, 0)
    real = sum(int((batch.document != PADDING).sum()) for batch in seen)
    assert real / sum(batch.input_ids.numel() for batch in seen) > 0.9
    assert all(batch.input_ids.shape[1] % 8 == 0 for batch in seen)
    lengths = [batch.input_ids.shape[1] for batch in seen]
    assert lengths != sorted(lengths)


def test_what_is_left_of_the_documents_is_the_last_batch_of_an_epoch(tmp_path):
    dataset = make_dataset(tmp_path, [(0, 2 + number) for number in range(10)], max_length=24)
    batches = StepBatches(dataset, TrainDataConfig(max_length=24, batch_size=4, packing=False, shuffle=True), seed=0)
    for epoch in range(4):
        steps = [batches.batch(3 * epoch + step) for step in range(3)]
        found = [sorted(document.index for document in batch.documents) for batch in steps]
        assert sorted(found[:2]) == [[0, 1, 2, 3], [4, 5, 6, 7]], "rows of a batch are of like length"
        assert found[2] == [8, 9]


def test_documents_meet_others_in_every_epoch(tmp_path):
    dataset = make_dataset(tmp_path, [(0, 6)] * 12, max_length=16)
    batches = StepBatches(dataset, TrainDataConfig(max_length=16, batch_size=6, packing=True, shuffle=True), seed=0)

    def neighbours(epoch):
        batch = batches.batch(epoch)
        rows = [row[row != PADDING].unique().tolist() for row in batch.document]
        return {frozenset(batch.documents[number].index for number in row) for row in rows}

    assert batches.steps_per_epoch == 1
    assert {len(pair) for pair in neighbours(0)} == {2}
    assert len({frozenset(neighbours(epoch)) for epoch in range(4)}) > 1, "each row holds the same documents in every epoch"


def test_all_packed_batches_have_one_length(tmp_path):
    dataset = make_dataset(tmp_path, [(0, 2 + n % 40) for n in range(100)], max_length=64)
    batches = StepBatches(dataset, TrainDataConfig(max_length=64, batch_size=3), seed=0)
    assert {batch.input_ids.shape[1] for batch in epoch_of(batches, 0)} == {64}


def test_packed_rows_are_no_longer_than_the_longest_needs(tmp_path):
    dataset = make_dataset(tmp_path, [(0, 10)] * 3, max_length=400)
    assert StepBatches(dataset, TrainDataConfig(max_length=400), seed=0).batch(0).input_ids.shape == (1, 40)  # 3 · 12 = 36


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_decreasing_is_that(lengths):
    capacity = 20
    rooms = []  # the plain algorithm: try every row
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda row: rooms[row])] -= length
        else:
            rooms.append(capacity - length)
    rows = best_fit(np.array(lengths), capacity)
    assert sorted(rows.lengths(np.array(lengths)).tolist()) == sorted(capacity - room for room in rooms)
    assert sorted(rows.members.tolist()) == list(range(len(lengths)))


def test_packing_wastes_little():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5, 1, 20_000).astype(np.int64), 2, 1024)
    rows = best_fit(lengths, 1024)
    assert rows.lengths(lengths).max() <= 1024
    assert lengths.sum() / (1024 * len(rows)) > 0.99
    shuffled = rows.exchanged(lengths, random).reordered(random.permutation(len(rows)))
    assert sorted(shuffled.lengths(lengths).tolist()) == sorted(rows.lengths(lengths).tolist())
    assert sorted(shuffled.members.tolist()) == list(range(20_000))
    assert shuffled.row(0).tolist() != rows.row(0).tolist()


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_rows_in_order_are_filled_as_far_as_they_go(lengths):
    rows = in_order(np.array(lengths), 20)
    assert rows.members.tolist() == list(range(len(lengths)))
    found = rows.lengths(np.array(lengths))
    assert found.max() <= 20
    for row in range(len(rows) - 1):
        assert found[row] + lengths[rows.row(row + 1)[0]] > 20


def test_weights_stay_with_their_tokens(tmp_path):
    dataset = make_dataset(tmp_path, [(1, 3), (2, 4), (0, 5), (3, 3)], weights=True)
    for batch in epoch_of(StepBatches(dataset, TrainDataConfig(max_length=16, batch_size=2), seed=0), 0):
        assert batch.weight is not None
        for row, place in zip(*(axis.tolist() for axis in torch.where(batch.document != PADDING)), strict=True):
            document = batch.documents[int(batch.document[row, place])]
            expected = float(batch.input_ids[row, place]) if document.index % 2 else 1.0
            assert batch.weight[row, place] == expected


def test_without_weights_a_batch_has_none(tmp_path):
    dataset = make_dataset(tmp_path, [(1, 3)])
    assert StepBatches(dataset, TrainDataConfig(max_length=16), seed=0).batch(0).weight is None


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_every_document_once_and_in_order(tmp_path, packing):
    dataset = make_dataset(tmp_path, [(1, 2 + n * 7 % 11) for n in range(31)])
    train = TrainDataConfig(max_length=16, batch_size=8, micro_batch_size=3, packing=packing)
    batches = EvalBatches(dataset, DataConfig(train=train, eval=EvalDataConfig(sources=("a",))))
    assert [document.index for batch in batches for document, *_ in pieces_of(batch)] == list(range(31))
    assert [len(batch.input_ids) for batch in batches][:-1] == [3] * (len(batches) - 1)
    few = EvalBatches(dataset, DataConfig(train=train, eval=EvalDataConfig(sources=("a",), batch_size=5, max_batches=2)))
    assert len(few) == 2
    assert [len(batch.input_ids) for batch in few] == [5, 5]
    assert few[-1].input_ids.tolist() == few[1].input_ids.tolist()
    with pytest.raises(IndexError):
        few[2]


@pytest.mark.parametrize("micro", [None, 1, 3, 8, 20])
def test_the_size_of_micro_batches_does_not_decide_what_is_measured(tmp_path, micro):
    dataset = make_dataset(tmp_path, [(1, 6)] * 31)
    train = TrainDataConfig(max_length=16, batch_size=8, micro_batch_size=micro, packing=False)
    batches = EvalBatches(dataset, DataConfig(train=train, eval=EvalDataConfig(sources=("a",), max_batches=2)))
    assert [document.index for batch in batches for document, *_ in pieces_of(batch)] == list(range(16))
    assert max(len(batch.input_ids) for batch in batches) == min(micro or 8, 16)


def test_large_vocabularies_keep_their_ids(tmp_path):
    writer = StoreWriter(tmp_path, 200_000)
    writer.add(Example(id="a"), tokenized_pair([150_000, 199_999, 65_536, EOS], begin=0, prompt=0))
    writer.close([], 0)
    options = {"max_length": 8, "overlong": "truncate", "learn_prompt": False, "pad_id": EOS}
    dataset = TokenDataset([TokenStore(tmp_path, "key")], **options)
    assert dataset.document(0).tokens.tolist() == [150_000, 199_999, 65_536, EOS]


def test_the_fingerprint_follows_tokens_and_cuts_only(tmp_path):
    documents = [(1, 3), (2, 30)]
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first = make_dataset(folders[0], documents)
    assert make_dataset(folders[1], documents).fingerprint == first.fingerprint
    assert make_dataset(folders[2], documents, overlong="split").fingerprint != first.fingerprint
    assert first.select(np.array([True, False])).fingerprint != first.fingerprint


def test_nothing_to_batch_is_said(tmp_path):
    dataset = make_dataset(tmp_path, [(0, 1)])
    with pytest.raises(WMTPError, match="no document"):
        StepBatches(dataset, TrainDataConfig(max_length=16), seed=0)


def test_a_batch_elsewhere_keeps_its_rows_on_the_cpu_too():
    values = torch.arange(12).view(3, 4)
    batch = Batch(input_ids=values, document=values, position=values, loss_mask=values > 3, documents=())
    assert batch.to(torch.device("cpu")).host is None
    moved = batch.to(torch.device("meta")).rows(1, 3)
    assert moved.input_ids.is_meta
    assert moved.host is not None
    assert torch.equal(moved.host.position, values[1:])


def test_a_store_beyond_two_to_the_31_tokens(tmp_path):
    """The files are sparse: two documents of a thousand tokens stand behind one of 2.2 billion zeros."""
    long, short = 2_200_000_000, 1000
    ends = [long, long + short, long + 2 * short]
    columns = {
        "ends": (np.int64, ends),
        "prompt_lengths": (np.int64, [0, 10, 20]),
        "is_correct": (np.int8, [-1, 1, 0]),
        "reward": (np.float64, [np.nan] * 3),
        "group_hashes": (np.uint64, [1, 2, 3]),
        "segment_ends": (np.int64, [long, long + 10, ends[1], ends[1] + 20, ends[2]]),
        "segment_kinds": (np.int8, [LEARNED, CONTEXT, LEARNED, CONTEXT, LEARNED]),
        "segment_scales": (np.float32, [1.0] * 5),
        "names": (np.uint8, list(b'["a", "a"]["b", "b"]["c", "c"]')),
        "name_ends": (np.int64, [10, 20, 30]),
    }
    for name, (dtype, values) in columns.items():
        np.array(values, dtype).tofile(tmp_path / f"{name}.bin")
    with (tmp_path / "tokens.bin").open("wb") as file:
        file.seek(2 * long)
        np.arange(2 * short, dtype=np.uint16).tofile(file)
    assert os.stat(tmp_path / "tokens.bin").st_blocks * 512 < 1_000_000
    info = {
        "documents": 3, "tokens": ends[-1], "bad": 0, "bad_messages": [], "token_type": "uint16", "has_weights": False,
        "has_scales": False, "conversations": 0, "notes": [], "digest": "x",
        "sizes": {file.name: file.stat().st_size for file in tmp_path.glob("*.bin")},
    }  # fmt: skip
    (tmp_path / STORE_INFO).write_text(json.dumps(info))
    store = TokenStore(tmp_path, "key")
    dataset = TokenDataset([store], max_length=1024, overlong="skip", learn_prompt=False, pad_id=0)
    assert (len(dataset), dataset.tokens, dataset.learned_tokens, dataset.counts.overlong) == (2, 2000, 1970, 1)
    last = dataset.document(1)
    assert last.tokens.tolist() == list(range(short, 2 * short))
    assert (last.document.id, last.prompt_length, int(last.loss_mask.sum())) == ("c", 20, 980)
    batch = StepBatches(dataset, TrainDataConfig(max_length=1024, batch_size=2), seed=0).batch(0)
    assert sorted(int(row[:short].sum()) for row in batch.input_ids) == [sum(range(short)), sum(range(short, 2 * short))]
    length = 1 << 20
    whole = TokenDataset([store], max_length=length, overlong="split", learn_prompt=False, pad_id=0)
    assert whole.tokens == ends[-1]
    piece = whole.document(long // length)  # the last of the long document
    assert (piece.document.start, len(piece.tokens)) == (long // length * length, long % length)
