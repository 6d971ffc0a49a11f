"""From config and files to tokenized documents and splits."""

import logging

import pytest
from prepared import PAIRS, prepare, prepare_file, texts, write_lines

from wmtp.config.schema import EvalDataConfig
from wmtp.data.config import HumanEval, Jsonl, PythonSource

BOS, EOS = 257, 256


def test_documents_are_begin_prompt_completion_end(tmp_path):
    record = {"prompt": "ab", "completion": "cd", "id": 7, "group": "g", "is_correct": True, "reward": 0.5}
    data = prepare_file(tmp_path, write_lines(tmp_path / "a.jsonl", [record, {"text": "xyz"}]))
    assert data.eval is None
    first, second = data.train.document(0), data.train.document(1)
    assert first.tokens.tolist() == [BOS, *b"abcd", EOS]
    assert first.loss_mask.tolist() == [False, False, False, True, True, True]
    assert (first.document.id, first.document.group, first.document.is_correct, first.document.reward) == ("7", "g", True, 0.5)
    assert second.tokens.tolist() == [BOS, *b"xyz", EOS]
    assert second.loss_mask.tolist() == [False, True, True, True, True]
    assert (second.document.id, second.document.is_correct, second.document.reward) == ("a.jsonl:2", None, None)
    assert data.train.learned_tokens == 3 + 4


def test_weights_per_token_or_per_text(tmp_path):
    records = [
        {"prompt": "p", "completion": "abc", "weights": [1, 2.5, 0]},
        {"prompt": "p", "completion": "abc", "weights": [1, 2, 3, 4]},
        {"prompt": "p", "completion": "abc", "weights": [["a", 0.5], ["bc", 2]]},
        {"prompt": "p", "completion": "abc"},
    ]
    data = prepare_file(tmp_path, write_lines(tmp_path / "a.jsonl", records)).train
    weights = [data.document(number).weight.tolist() for number in range(4)]
    assert weights == [[1, 1, 1, 2.5, 0, 1], [1, 1, 1, 2, 3, 4], [1, 1, 0.5, 2, 2, 1], [1, 1, 1, 1, 1, 1]]


def test_a_holdout_keeps_groups_together(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    data = prepare_file(tmp_path, path, evaluation=EvalDataConfig(holdout=0.2))
    sides = []
    for dataset in (data.train, data.eval):
        documents = [dataset.document(number).document for number in range(len(dataset))]
        sides.append(({document.group for document in documents}, {document.index for document in documents}))
    (train_groups, train_documents), (eval_groups, eval_documents) = sides
    assert not train_groups & eval_groups
    assert train_documents | eval_documents == set(range(30))
    assert len(eval_documents) == 6
    again = prepare_file(tmp_path, path, evaluation=EvalDataConfig(holdout=0.2))
    assert again.eval.fingerprint == data.eval.fingerprint
    chosen = {prepare_file(tmp_path, path, evaluation=EvalDataConfig(holdout=0.2), seed=s).eval.fingerprint for s in range(6)}
    assert len(chosen) > 1


@pytest.mark.parametrize("share", [1e-6, 0.999999])
def test_a_holdout_leaves_something_on_both_sides(tmp_path, share):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    data = prepare_file(tmp_path, path, evaluation=EvalDataConfig(holdout=share))
    assert min(len(data.train), len(data.eval)) == 3


def test_pieces_of_a_split_document_stay_on_one_side(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"{n} " + "x" * 40} for n in range(10)])
    data = prepare_file(tmp_path, path, evaluation=EvalDataConfig(holdout=0.3), max_length=16, overlong="split")
    assert not set(data.train.indices.tolist()) & set(data.eval.indices.tolist())
    assert len(set(data.eval.indices.tolist())) == 3


def test_several_sources_follow_each_other(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [{"text": "one one"}, {"text": "two two"}])
    second = write_lines(tmp_path / "b.jsonl", [{"text": "three", "weights": [1, 2, 3, 4, 5]}])
    third = write_lines(tmp_path / "c.jsonl", [{"text": "measured"}])
    datasets = {name: Jsonl(uri="") for name in "abc"}
    paths = {"a": first, "b": second, "c": third}
    data = prepare(tmp_path, datasets, paths, evaluation=EvalDataConfig(sources=("c",)))
    assert texts(data.train) == ["one one", "two two", "three"]
    assert texts(data.eval) == ["measured"]
    assert [data.train.document(number).document.index for number in range(3)] == [0, 1, 2]
    assert data.train.document(0).weight.tolist() == [1.0] * 9
    assert data.train.document(2).weight.tolist() == [1, 1, 2, 3, 4, 5, 1]


def test_evaluation_data_can_be_learned_from_when_allowed(tmp_path):
    path = write_lines(
        tmp_path / "exam.jsonl", [{"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}]
    )
    data = prepare(tmp_path, {"exam": HumanEval(uri="", allow_training=True)}, {"exam": path})
    assert texts(data.train) == ["def f():\n    return 1\n"]


def test_the_standard_library_is_data(tmp_path):
    train = {"max_length": 512}
    source = PythonSource(max_functions=200, max_length=2000)
    data = prepare(tmp_path, {"py": source}, {"py": None}, evaluation=EvalDataConfig(holdout=0.1), **train)
    assert 170 <= len(data.train) + len(data.eval) <= 200
    assert data.train.tokens > 20_000


def test_the_log_says_what_became_of_the_documents(tmp_path, caplog):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "abcdefghijkl"}, {"text": ""}, {"txt": ""}])
    with caplog.at_level(logging.INFO, "wmtp"):
        prepare_file(tmp_path, path, max_length=8, on_bad_example="skip")
    lines = [record.getMessage() for record in caplog.records if "data.train" in record.getMessage()]
    assert lines == [
        "data.train: d: data.train.max_length = 8 cuts off 6 tokens that would be learned, of 1 of 3 documents "
        "(the first: a.jsonl:2); raise max_length, or see data.train.overlong",
        "data.train: d: 3 documents, 13 tokens, 11 learned, 1 truncated, 1 left out with nothing to learn, 1 bad and left out",
    ]


def test_mbpp_is_read_where_it_is_at_hand(tmp_path, mbpp):
    from wmtp.data.config import Mbpp

    data = prepare(tmp_path, {"mbpp": Mbpp(uri="")}, {"mbpp": mbpp}, evaluation=EvalDataConfig(holdout=0.1), max_length=2048)
    assert len(data.train) + len(data.eval) == 374
