"""Records for the report: bins against a plain loop, every number at its token, and which documents when."""

import itertools
import json
import math

import pytest
import torch
from attrs import evolve

from wmtp.config.schema import ReportConfig
from wmtp.data.batch import PADDING, Batch, Document, align_targets
from wmtp.loss.weights import weight_histogram
from wmtp.runs.weight_bins import WEIGHT_BINS
from wmtp.testing.steps import HORIZON, VOCAB_SIZE, make_view, random_step
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.trainers import Trainer
from wmtp.training.recording import TokenRecord
from wmtp.training.step import StepOutput
from wmtp.training.telemetry import Recorder


def plain_histogram(weights, valid):
    counts = [[0] * len(WEIGHT_BINS) for _ in range(weights.shape[-1])]
    edges = [0.0] + [math.sqrt(a * b) for a, b in itertools.pairwise(WEIGHT_BINS[1:])]
    for row in range(weights.shape[0]):
        for place in range(weights.shape[1]):
            for head in range(weights.shape[2]):
                if valid[row, place, head]:
                    weight = float(weights[row, place, head])
                    counts[head][0 if weight == 0 else sum(weight >= edge for edge in edges)] += 1
    return counts


def test_weights_are_counted_in_their_bins():
    generator = torch.Generator().manual_seed(0)
    weights = torch.exp2(24 * torch.rand(4, 30, 3, generator=generator) - 12)
    weights[torch.rand(weights.shape, generator=generator) < 0.2] = 0.0
    weights[0, 0] = 1.0
    valid = torch.rand(weights.shape, generator=generator) < 0.7
    valid[0, 0] = True
    found = weight_histogram(weights, valid)
    assert found.tolist() == plain_histogram(weights, valid)
    assert found.sum(dim=1).tolist() == valid.sum(dim=(0, 1)).tolist()


def test_a_weight_of_one_is_the_middle_of_its_bin():
    one = torch.ones(1, 1, 1)
    (place,) = weight_histogram(one, one.bool())[0].nonzero()
    assert WEIGHT_BINS[int(place)] == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_weights_that_are_not_allowed_do_not_break_the_histogram(value):
    """The loop reads its own check of them first, and then says whose they are."""
    weights = torch.full((1, 2, 1), value)
    assert int(weight_histogram(weights, torch.ones(1, 2, 1).bool()).sum()) == 2


def recorder(folder, batches, *, total_steps=10, **config):
    """A recorder, and what it wants of a step where ``batches`` are an epoch."""
    made = Recorder(ReportConfig(**config), BytesTokenizer(), total_steps=total_steps, followed=batches[0])
    if folder is not None:
        made.open(folder, 0)
    return made


def wanted(recorder, step, batches):
    return recorder.recording(step, batches[step % len(batches)], epoch=step // len(batches), epoch_steps=len(batches))


def outputs(batch, *, seed=0, **parts):
    """Make the output of a step from random numbers."""
    targets = align_targets(batch, HORIZON)
    draw = torch.Generator().manual_seed(seed)
    weights = torch.where(targets.valid, torch.rand(targets.valid.shape, generator=draw) + 0.5, 0.0)
    losses = torch.where(targets.valid, torch.rand(targets.valid.shape, generator=draw), 0.0)
    details = {
        "by_token": torch.randn(batch.input_ids.shape, generator=draw),
        "by_prediction": torch.randn(targets.valid.shape, generator=draw),
    }
    record = TokenRecord(weights=weights, losses=losses, valid=targets.valid, details=details)
    return evolve(record, **parts)


def write(recorder, step, batches, record):
    batch = batches[step % len(batches)]
    output = StepOutput(
        loss=torch.zeros(()),
        bad_weights=torch.zeros(()),
        metrics={"weight/mean": torch.tensor(1.5)},
        weight_histogram=None if record.weights is None else weight_histogram(record.weights, record.valid),
        tokens=record,
    )
    recorder.write(step + 1, "train", batch, wanted(recorder, step, batches), output)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("seed", range(4))
def test_every_number_stands_at_its_token(tmp_path, packed, seed):
    """Head k's number of token j is that of the prediction at j − k, wherever the document stands in its row."""
    batch = random_step(seed, packed=packed).batch
    record = outputs(batch)
    recorded = recorder(tmp_path, [batch], samples=99)
    write(recorded, 0, [batch], record)
    recorded.close()
    (line,) = lines(tmp_path / "samples.jsonl")
    assert line["mean_weight"] == 1.5
    shown = {document["index"]: document for document in line["documents"]}
    for number, document in enumerate(batch.documents):
        places = [(row, place) for row, place in (batch.document == number).nonzero().tolist()]
        learns = any(bool(batch.loss_mask[place]) for place in places[1:])
        assert (document.index in shown) == learns, "a document is shown where something in it is predicted"
        if not learns:
            continue
        seen = shown[document.index]
        assert len(seen["tokens"]) == len(places)
        for j, (row, place) in enumerate(places):
            for k in range(1, HORIZON + 1):
                predicted = j - k >= 0 and bool(batch.loss_mask[row, place])
                for name, values in (
                    ("weight", record.weights),
                    ("loss", record.losses),
                    ("by_prediction", record.details["by_prediction"]),
                ):
                    given = seen["details"][name] if name == "by_prediction" else seen[name]
                    if predicted:
                        assert given[k - 1][j] == pytest.approx(float(values[row, place - k, k - 1]), rel=1e-3)
                    else:
                        assert given[k - 1][j] is None
            by_token = seen["details"]["by_token"][j]
            if batch.loss_mask[row, place]:
                assert by_token == pytest.approx(float(record.details["by_token"][row, place]), rel=1e-3)
            else:
                assert by_token is None


def test_numbers_that_are_none_and_stages_without_weights(tmp_path):
    batch = random_step(0, packed=True).batch
    record = outputs(batch, weights=None)
    record.losses.fill_(math.nan)
    record.details["by_token"].fill_(math.inf)
    recorded = recorder(tmp_path, [batch])
    write(recorded, 0, [batch], record)
    (line,) = lines(tmp_path / "samples.jsonl")
    for document in line["documents"]:
        assert document["weight"] is None
        assert {value for head in document["loss"] for value in head} == {None}
        assert set(document["details"]["by_token"]) == {None}
    assert lines(tmp_path / "weights.jsonl") == []


def text_batch(numbers, *, rows_of=2, length=8):
    """Documents of ``length`` tokens, ``rows_of`` in each row."""
    rows = [numbers[i : i + rows_of] for i in range(0, len(numbers), rows_of)]
    shape = (len(rows), rows_of * length)
    document = torch.full(shape, PADDING)
    for row, members in enumerate(rows):
        for place in range(len(members)):
            document[row, place * length : (place + 1) * length] = row * rows_of + place
    return Batch(
        input_ids=torch.full(shape, 65) % VOCAB_SIZE,
        document=document,
        position=torch.arange(shape[1]).expand(shape) % length,
        loss_mask=document != PADDING,
        documents=[Document(index=n, start=0, id=f"d{n}", group=f"d{n}") for n in numbers],
    )


def recorded_documents(folder, batches, total_steps, **config):
    """step → the indices of the documents that are recorded."""
    recorded = recorder(folder, batches, total_steps=total_steps, **config)
    for step in range(total_steps):
        write(recorded, step, batches, outputs(batches[step % len(batches)]))
    recorded.close()
    return {line["step"]: [d["index"] for d in line["documents"]] for line in lines(folder / "samples.jsonl")}


def test_documents_of_each_row_at_the_first_the_last_and_every_nth_step_and_the_followed_ones(tmp_path):
    batches = [text_batch(range(first, first + 4)) for first in (0, 4, 8)]
    found = recorded_documents(tmp_path, batches, 20, samples=2, sample_interval=6)
    # documents 0 and 2 start the two rows of the first batch, which comes every third step: each second time is enough
    assert found == {1: [0, 2], 6: [8, 10], 7: [0, 2], 12: [8, 10], 13: [0, 2], 18: [8, 10], 19: [0, 2], 20: [4, 6]}


def test_followed_documents_come_first(tmp_path):
    batches = [text_batch(range(8))]
    assert set(map(tuple, recorded_documents(tmp_path, batches, 9, samples=3, sample_interval=4).values())) == {(0, 2, 4)}


def test_only_the_first_tokens(tmp_path):
    batch = text_batch(range(2))
    recorded = recorder(tmp_path, [batch], sample_tokens=5)
    write(recorded, 0, [batch], outputs(batch))
    (line,) = lines(tmp_path / "samples.jsonl")
    assert [len(d["tokens"]) for d in line["documents"]] == [5, 5]
    assert all(len(head) == 5 for d in line["documents"] for head in d["weight"])


def test_off_costs_nothing(tmp_path):
    batch = text_batch(range(4))
    recorded = recorder(tmp_path, [batch], samples=0, weight_interval=0)
    assert all(not r.weights and not r.documents for r in (wanted(recorded, step, [batch]) for step in range(10)))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_writes_nothing_chooses_the_same(tmp_path):
    batches = [text_batch(range(first, first + 4)) for first in (0, 4, 8)]
    here, there = recorder(tmp_path, batches), recorder(None, batches)
    for step in range(10):
        assert wanted(here, step, batches) == wanted(there, step, batches)
    write(there, 0, batches, outputs(batches[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.jsonl", "weights.jsonl"]


def test_default_intervals_grow_with_the_run(tmp_path):
    first, other = text_batch(range(4)), text_batch(range(4, 8))
    for total in (1, 16, 5000):
        batches = [first] + [other] * (total - 1)
        recorded = recorder(tmp_path, batches, total_steps=total)
        chosen = [wanted(recorded, step, batches) for step in range(total)]
        assert chosen[0].weights
        assert chosen[0].documents
        assert chosen[-1].weights
        assert chosen[-1].documents
        assert sum(bool(recording.documents) for recording in chosen) == min(total, 17)
        assert sum(recording.weights for recording in chosen) == min(total, 201)


def test_observations_are_the_details_of_a_trainer_that_says_nothing():
    class Observing(Trainer):
        def observe(self, view):
            return {"norm": view.trunk.norm(dim=-1)}

    view = make_view(Observing(), random_step(0, packed=True))
    assert Observing().token_details(view).keys() == {"norm"}
