"""Data refused by name: bad lines, nothing to learn, senseless sources, loaders that break the contract."""

import attrs
import pytest
from prepared import prepare, prepare_file, texts, write_lines

from wmtp.config.schema import EvalDataConfig
from wmtp.data.base import Example, ExampleLoader
from wmtp.data.config import CodeContests, HumanEval, Jsonl
from wmtp.errors import ConfigError, PluginError, WMTPError
from wmtp.plugins.contract import DataLoaderConfig


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
    with pytest.raises(WMTPError, match=message) as error:
        prepare_file(tmp_path, write_lines(tmp_path / "a.jsonl", records), **options)
    assert error.value.exit_code == 2


def test_text_that_is_no_unicode_is_a_bad_example(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud800"}\n')
    with pytest.raises(WMTPError, match=r"a.jsonl:2: holds an unpaired surrogate"):
        prepare_file(tmp_path, path)


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
        ([Example(id=3, completion="abcd")], "an Example whose id is 3, not a text"),
        ([Example(id="3", completion=b"abcd")], "an Example whose completion is b'abcd', not a text"),
        ([Example(id="3", completion="abcd", is_correct="yes")], "is_correct is 'yes'"),
        ([Example(id="3", completion="abcd", is_cut="length")], "is_cut is 'length'"),
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
