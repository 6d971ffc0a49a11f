"""Numbers of tokens are computed once, and found again whatever the rows."""

import json

import numpy as np
import pytest
import torch

from wmtp.config.schema import TrainDataConfig
from wmtp.data.batches import StepBatches
from wmtp.data.cache import token_store
from wmtp.data.config import Jsonl
from wmtp.data.dataset import TokenDataset
from wmtp.data.score_cache.token_numbers import TokenNumbers
from wmtp.errors import WMTPError
from wmtp.tokenizers.bytes import BytesTokenizer


@pytest.fixture
def dataset(tmp_path):
    """Documents of 3 to 60 tokens, the long ones split."""
    path = tmp_path / "a.jsonl"
    lines = [{"id": f"d{i}", "prompt": "p" * (i % 4), "completion": "xyz"[i % 3] * (2 + 7 * i % 55)} for i in range(23)]
    path.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = BytesTokenizer()
    store = token_store("a", Jsonl(uri=str(path)), path, tokenizer, cache_dir=tmp_path / "tokens", on_bad_example="error")
    return TokenDataset([store], max_length=24, overlong="split", learn_prompt=False, pad_id=tokenizer.eos_id)


def batches(dataset, *, packing, seed=0):
    made = StepBatches(dataset, TrainDataConfig(max_length=24, batch_size=3, packing=packing), seed=seed)
    return [made.batch(step) for step in range(made.steps_per_epoch)]


def number_of(batch):
    """A number that only this token has: by its document, the piece of it, and the place in that."""
    first = torch.tensor([1000.0 * document.index + document.start for document in batch.documents])
    return torch.where(batch.document >= 0, first[batch.document] + batch.position, 0.0)


def never():
    raise AssertionError("computed again")


@pytest.mark.parametrize("packing", [False, True])
def test_what_was_computed_is_found_in_other_rows_and_by_other_processes(dataset, tmp_path, packing):
    assert dataset.counts.split
    numbers = TokenNumbers(tmp_path / "n.f32", dataset)
    assert not numbers.complete
    first = batches(dataset, packing=packing)
    for batch in first[:-1]:
        assert torch.equal(numbers.get(batch, lambda batch=batch: number_of(batch)), number_of(batch))
    again = TokenNumbers(tmp_path / "n.f32", dataset)  # the process ended here
    assert not again.complete
    for batch in first[:-1]:
        again.get(batch, never)
    again.get(first[-1], lambda: number_of(first[-1]))
    assert again.complete
    for batch in batches(dataset, packing=not packing, seed=5):
        assert torch.equal(again.get(batch, never), number_of(batch))


def test_a_selection_has_places_of_its_own(dataset, tmp_path):
    half = dataset.select(np.arange(len(dataset)) % 2 == 1)
    numbers = TokenNumbers(tmp_path / "n.f32", half)
    for batch in batches(half, packing=True):
        numbers.get(batch, lambda batch=batch: number_of(batch))
    assert numbers.complete
    assert (tmp_path / "n.f32").stat().st_size == 4 * half.tokens
    for batch in batches(half, packing=False):
        assert torch.equal(numbers.get(batch, never), number_of(batch))


def test_a_file_that_was_cut_is_made_again(dataset, tmp_path):
    path = tmp_path / "n.f32"
    numbers = TokenNumbers(path, dataset)
    for batch in batches(dataset, packing=True):
        numbers.get(batch, lambda batch=batch: number_of(batch))
    del numbers
    path.write_bytes(path.read_bytes()[:-8])
    assert not TokenNumbers(path, dataset).complete
    assert path.stat().st_size == 4 * dataset.tokens


def test_a_folder_that_cannot_be_written(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WMTPError, match=r"the token cache cannot be written \(.*\); free some space, or set data\.cache_dir"):
        TokenNumbers(tmp_path / "file" / "n.f32", dataset)


def test_a_batch_of_which_a_part_is_known(dataset, tmp_path):
    numbers = TokenNumbers(tmp_path / "n.f32", dataset)
    known = batches(dataset, packing=False)[0]
    numbers.get(known, lambda: number_of(known))
    for batch in batches(dataset, packing=True):
        assert torch.equal(numbers.get(batch, lambda batch=batch: number_of(batch)), number_of(batch))
    assert numbers.complete
