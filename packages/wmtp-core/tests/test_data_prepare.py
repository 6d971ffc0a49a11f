"""From config and files to tokenised data: the cache, splits, and what is refused."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import attrs
import pytest

from wmtp.config.schema import Config, DataConfig, EvalDataConfig, ModelConfig, RunConfig, TrainDataConfig
from wmtp.data.base import Example, ExampleLoader
from wmtp.data.cache import token_store
from wmtp.data.config import CodeContests, HumanEval, Jsonl, PythonSource
from wmtp.data.loaders.jsonl import JsonlLoader
from wmtp.data.prepare import prepare_data
from wmtp.errors import ConfigError, PluginError, WMTPError
from wmtp.plugins.contract import DataLoaderConfig, TrainerConfig
from wmtp.tokenizers.bytes import BytesTokenizer

BOS, EOS = 257, 256


@attrs.frozen(kw_only=True)
class Unused(TrainerConfig):
    type = "unused"

    def build(self):
        raise AssertionError("data preparation builds no model and no trainer")


@attrs.frozen(kw_only=True)
class Generated(DataLoaderConfig):
    """A plugin's data set that reads no file."""

    type = "generated"
    count: int = 3

    def build(self):
        return GeneratedLoader(self.count)


class GeneratedLoader(ExampleLoader):
    def __init__(self, count):
        self.count = count

    def examples(self, path):
        assert path is None
        for number in range(self.count):
            yield Example(id=str(number), completion=f"number {number}")


class CountingTokenizer(BytesTokenizer):
    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return super().encode(text)


class UpperCaseTokenizer(BytesTokenizer):
    def encode(self, text):
        return super().encode(text.upper())

    def fingerprint(self):
        return "upper"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare(tmp_path, datasets, paths, tokenizer=None, *, evaluation=None, seed=0, **train):
    config = Config(
        models={"base": ModelConfig(loader=Unused())},
        trainer=Unused(),
        datasets=datasets,
        run=RunConfig(output_dir=str(tmp_path / "runs"), seed=seed),
        data=DataConfig(train=TrainDataConfig(**train), eval=evaluation),
    )
    return prepare_data(config, tokenizer or BytesTokenizer(), paths)


def prepare_file(tmp_path, path, tokenizer=None, **options):
    return prepare(tmp_path, {"d": Jsonl(uri=str(path))}, {"d": path}, tokenizer, **options)


def texts(dataset):
    tokenizer = BytesTokenizer()
    return [tokenizer.decode(dataset.document(number).tokens.tolist()) for number in range(len(dataset))]


PAIRS = [{"prompt": f"q{n} ", "completion": f"answer {n}", "group": f"p{n // 3}"} for n in range(30)]


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


def test_the_second_preparation_tokenises_nothing(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    tokenizer = CountingTokenizer()
    first = prepare_file(tmp_path, path, tokenizer)
    assert tokenizer.calls == 60
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    # how rows are cut, and where the file is, is decided after the cache
    (moved / "a.jsonl").write_bytes(path.read_bytes())
    for again in (path, moved / "a.jsonl"):
        second = prepare_file(tmp_path, again, tokenizer, max_length=64, learn_prompt=True, overlong="split")
        assert tokenizer.calls == 60
        assert texts(second.train) == texts(first.train)


def test_a_changed_byte_or_tokenizer_or_key_is_tokenised_anew(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    prepare_file(tmp_path, path)
    assert texts(prepare_file(tmp_path, path, UpperCaseTokenizer()).train)[0] == "Q0 ANSWER 0"
    path.write_text(path.read_text().replace("answer 0", "answet 0", 1))
    assert texts(prepare_file(tmp_path, path).train)[0] == "q0 answet 0"
    swapped = Jsonl(uri="", keys={"prompt": "completion", "completion": "prompt"})
    assert texts(prepare(tmp_path, {"d": swapped}, {"d": path}).train)[1] == "answer 1q1 "
    path.rename(tmp_path / "b.jsonl")
    assert prepare_file(tmp_path, tmp_path / "b.jsonl").train.document(2).document.id == "b.jsonl:3"


def test_a_source_without_files_is_keyed_by_its_config(tmp_path):
    assert len(prepare(tmp_path, {"d": Generated(count=3)}, {"d": None}).train) == 3
    assert len(prepare(tmp_path, {"d": Generated(count=4)}, {"d": None}).train) == 4


@pytest.mark.parametrize("damage", ["truncate", "delete", "garbage"])
def test_a_damaged_cache_is_made_again(tmp_path, damage, caplog):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    expected = texts(prepare_file(tmp_path, path).train)
    (store,) = (tmp_path / "runs" / ".cache" / "tokens").iterdir()
    if damage == "truncate":
        content = (store / "tokens.bin").read_bytes()
        (store / "tokens.bin").write_bytes(content[:-2])
    elif damage == "delete":
        (store / "ends.bin").unlink()
    else:
        (store / "store.json").write_text("{")
    with caplog.at_level(logging.WARNING, "wmtp"):
        assert texts(prepare_file(tmp_path, path).train) == expected
    assert "damaged" in caplog.text
    assert [entry.name for entry in (tmp_path / "runs" / ".cache" / "tokens").iterdir()] == [store.name]


SLOW_BUILD = """
import sys, time
from pathlib import Path
from wmtp.data.cache import token_store
from wmtp.data.config import Jsonl
from wmtp.tokenizers.bytes import BytesTokenizer

class Slow(BytesTokenizer):
    def encode(self, text):
        time.sleep(float(sys.argv[3]))
        return super().encode(text)

store = token_store("d", Jsonl(uri=""), Path(sys.argv[1]), Slow(), cache_dir=Path(sys.argv[2]), on_bad_example="error")
print(len(store), int(store.tokens.sum()))
"""


def test_a_build_that_is_killed_leaves_nothing_that_counts(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    cache = tmp_path / "runs" / ".cache" / "tokens"
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, path, cache, "0.5"])
    while not list(cache.glob(".building-*/tokens.bin")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tokenizer = CountingTokenizer()
    assert len(prepare_file(tmp_path, path, tokenizer).train) == 30
    assert tokenizer.calls == 60


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from wmtp.data import ahead, building
from wmtp.data.cache import token_store
from wmtp.data.config import Jsonl
from wmtp.tokenizers.bytes import BytesTokenizer

class Killed(BytesTokenizer):
    calls = 0

    def encode(self, text):
        self.calls += 1
        if self.calls > int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)

building._PROGRESS_SECONDS = 0
ahead._DOCUMENTS = 4
token_store("d", Jsonl(uri=""), Path(sys.argv[1]), Killed(), cache_dir=Path(sys.argv[2]), on_bad_example="skip")
"""


def test_a_build_that_is_killed_is_resumed_and_gives_the_same(tmp_path):
    records = [record | ({"weights": [0.5] * (len(record["completion"]))} if n > 8 else {}) for n, record in enumerate(PAIRS)]
    path = write_lines(tmp_path / "a.jsonl", [{"text": 3}, *records])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, calls, status in ((whole, 1000, 0), (cut, 30, -signal.SIGKILL)):
        assert subprocess.run([sys.executable, "-c", KILLED_BUILD, path, folder, str(calls)]).returncode == status
    done = json.loads(next(cut.glob(".building-*/progress.json")).read_text())["done"]
    assert 8 <= done < 20
    # what was written after the progress is dropped
    with next(cut.glob(".building-*/tokens.bin")).open("ab") as file:
        file.write(b"torn")
    tokenizer = CountingTokenizer()
    config = Jsonl(uri="")
    store = token_store("d", config, path, tokenizer, cache_dir=cut, on_bad_example="skip")
    assert tokenizer.calls == 2 * (31 - done)
    assert store.info == token_store("d", config, path, tokenizer, cache_dir=whole, on_bad_example="skip").info
    assert (store.info.documents, store.info.bad) == (30, 1)
    assert [entry.name for entry in cut.iterdir()] == [store.key]


def test_two_processes_at_once_agree(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_BUILD, path, tmp_path / "cache", "0.01"], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(set(said)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


class GrowingLoader(JsonlLoader):
    """Reads a file to which somebody appends meanwhile, as large as before or not."""

    append = b""

    def examples(self, path):
        yield from super().examples(path)
        content = path.read_bytes() if path.is_file() else b""
        if self.append:
            path.write_bytes(content[: -len(self.append)] + self.append)


@pytest.mark.parametrize("append", [b"", b"{}\n", b'"}\n'])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, append):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(GrowingLoader, "append", append)
    monkeypatch.setattr(Jsonl, "build", lambda self: GrowingLoader())
    if not append:
        assert len(prepare(tmp_path, {"a": Jsonl(uri=str(path))}, {"a": path}).train) == 2
        return
    with pytest.raises(WMTPError, match=r"datasets\.a: .*a\.jsonl has changed while it was read; run again once it is whole"):
        prepare(tmp_path, {"a": Jsonl(uri=str(path))}, {"a": path})
    assert not list(tmp_path.rglob("store.json"))


def test_a_split_that_a_fetched_folder_leaves_open_is_said_with_its_key(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        write_lines(tmp_path / name, [{"text": "one"}])
    with pytest.raises(ConfigError, match=r"datasets\.a\.split: .* holds the splits test .*, train .*; write which"):
        prepare(tmp_path, {"a": Jsonl(uri="hf://datasets/x/y")}, {"a": tmp_path})


def test_a_source_of_which_its_settings_leave_nothing_is_an_error(tmp_path):
    solutions = {"language": [3], "solution": ["print(1)"]}
    path = write_lines(tmp_path / "a.jsonl", [{"name": "1_A", "description": "Print.", "solutions": solutions}])
    assert len(prepare(tmp_path, {"d": CodeContests(uri="")}, {"d": path}).train) == 1
    with pytest.raises(
        WMTPError, match=r"datasets\.d: it gives no example .*; it is empty, or its settings leave nothing of it"
    ):
        prepare(tmp_path, {"d": CodeContests(uri="", languages=("cpp",))}, {"d": path})


def test_all_bad_lines_are_said_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n{oops\n{"prompt": "p", "completion": "abc", "weights": [1, 2]}\n')
    with pytest.raises(WMTPError) as error:
        prepare_file(tmp_path, path)
    message = str(error.value)
    assert f'{path}:2: "text" must be a string, not a number' in message
    assert f"{path}:3: not valid JSON" in message
    assert f"{path}:4: has 2 weights, but its completion is 3 tokens" in message
    assert "on_bad_example" in message
    # what was skipped is remembered: the cache is not taken for a clean one
    assert texts(prepare_file(tmp_path, path, on_bad_example="skip").train) == ["fine"]
    assert prepare_file(tmp_path, path, on_bad_example="skip").train.counts.bad == 3
    with pytest.raises(WMTPError, match="not valid JSON"):
        prepare_file(tmp_path, path)


def test_many_bad_lines_are_cut_short(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": 3}] * 50)
    with pytest.raises(WMTPError) as error:
        prepare_file(tmp_path, path)
    assert f"{path}:10:" in str(error.value)
    assert f"{path}:11:" not in str(error.value)
    with pytest.raises(WMTPError, match="all 50 examples are bad"):
        prepare_file(tmp_path, path, on_bad_example="skip")


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "datasets.d: it gives no example .*; it is empty, or its settings leave nothing of it"),
        ([{"text": ""}, {"text": "a"}], {}, "datasets.d: none of its 2 documents has a token to learn after its first"),
        ([{"prompt": "long prompt", "completion": "b"}], {"max_length": 8}, "once cut to data.train.max_length = 8"),
        ([{"text": "much too long"}], {"max_length": 8, "overlong": "skip"}, "longer than data.train.max_length = 8"),
        ([{"text": "alone"}], {"evaluation": EvalDataConfig(holdout=0.5)}, "data.eval.holdout: d has 1 document"),
    ],
)
def test_data_with_nothing_to_learn_is_an_error(tmp_path, records, options, message):
    with pytest.raises(WMTPError, match=message):
        prepare_file(tmp_path, write_lines(tmp_path / "a.jsonl", records), **options)


def test_text_that_is_no_unicode_is_a_bad_example(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud800"}\n')
    with pytest.raises(WMTPError, match=r"a.jsonl:2: half of a surrogate pair"):
        prepare_file(tmp_path, path)


def test_a_full_disk_is_said_as_such(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(WMTPError, match="token cache cannot be written"):
        prepare_file(tmp_path, path)


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


def test_sources_that_make_no_sense(tmp_path):
    datasets = {"a": Jsonl(uri=""), "exam": HumanEval()}

    def problems(evaluation=None, **train):
        with pytest.raises(ConfigError) as error:
            prepare(tmp_path, datasets, {}, evaluation=evaluation, **train)
        return "\n".join(error.value.problems)

    assert "datasets.exam: 'humaneval' is for evaluation only" in problems()
    assert "there is no [datasets.b]; there are: a, exam" in problems(sources=("b",))
    assert "names 'a' twice" in problems(sources=("a", "a"))
    assert "names no data set" in problems(sources=())
    assert "'a' is training data too" in problems(EvalDataConfig(sources=("a",)), sources=("a",))
    assert "data.eval: has neither" in problems(EvalDataConfig(), sources=("a",))
    assert "conflicts with" in problems(EvalDataConfig(sources=("exam",), holdout=0.1))


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


@attrs.frozen(kw_only=True)
class Odd(DataLoaderConfig):
    """A plugin's data set that breaks the contract."""

    type = "odd"
    examples: object = None

    def build(self):
        return OddLoader(self.examples)


class OddLoader(ExampleLoader):
    def __init__(self, given):
        self.given = given

    def examples(self, path):
        return self.given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "examples() returned None, not an iterator"),
        ([{"prompt": "a", "completion": "b"}], "(dict), not an Example"),
        ([Example(id=3, completion="abcd")], "an Example with 3 where a string belongs"),
        ([Example(id="3", completion=b"abcd")], "an Example with b'abcd' where a string belongs"),
        ([Example(id="3", completion="abcd", is_correct="yes")], "is_correct is 'yes'"),
        ([Example(id="3", completion="abcd", reward=float("nan"))], "reward is nan"),
        ([Example(id="3", completion="abcd", weights=(("ab", 1.0), 3.0))], "neither numbers nor (text, number) tuples"),
    ],
)
def test_a_loader_that_yields_something_else_is_named(tmp_path, given, message):
    with pytest.raises(PluginError) as caught:
        prepare(tmp_path, {"d": Odd(examples=given)}, {"d": None})
    assert str(caught.value).startswith("datasets.d: data loader ")
    assert "OddLoader: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_from_a_loader_are_finite_and_not_negative(tmp_path, weight):
    given = [Example(id="3", completion="abc", weights=(1.0, weight, 1.0))]
    with pytest.raises(WMTPError, match=f"3: has a weight of {weight}"):
        prepare(tmp_path, {"d": Odd(examples=given)}, {"d": None})
