"""`wmtp check` looks at data files: their names, their format, their first records."""

import json
import subprocess
import sys

import pytest

from wmtp.actions.check import check
from wmtp.config.load import load
from wmtp.config.rules import check_loaded
from wmtp.errors import ConfigError

BASE = """
[models.base]
type = "scratch"
vocab_size = 300

[trainer]
type = "baseline-mtp"

"""
TALK = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
PAIR = b'{"prompt": "a", "completion": "b"}\n'


def write(tmp_path, files, table):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    config = tmp_path / "run.toml"
    config.write_text(BASE + table.replace("DATA", str(tmp_path / "d")))
    return config


JSONL = 'type = "jsonl"'
#: what `wmtp check` says of a file: its name and content, the table, the key that is at fault, and the message
CASES = [
    ("d/a.jsonl", b"prompt,completion\na,b\n", JSONL, "uri", r"a\.jsonl:1: not valid JSON: .*; a table\? name it \.csv"),
    ("d/a.jsonl", b'[{"text": "a"}]', JSONL, "uri", r"a\.jsonl:1: not a JSON object but a list"),
    ("d/a.csv", b"question,answer\na,b\n", JSONL, "uri", r'a\.csv:2: no "prompt"; .*the keys here are question, answer;'),
    ("d/a.csv", b"question,answer\na,b\n", JSONL, "uri", r'perhaps keys = { prompt = "question", completion = "answer" }'),
    ("d/a.jsonl", TALK, JSONL, "uri", r'a\.jsonl:1: no "prompt"; .*; it is a conversation: write type = "chat"'),
    ("d/a.jsonl", b'{"text": "a"}', 'type = "chat"', "uri", r"a\.jsonl:1: is no conversation of a known form"),
    (
        *("d/a.jsonl", PAIR, f'{JSONL}\nkeys = {{ prompt = "a", completion = "a" }}', "keys"),
        r'prompt and completion are read from one column, "a"; name another one',
    ),
    ("d", PAIR, 'type = "python-source"', "uri", r"d: is no \.py file; name one, or a folder of them"),
    ("d/a.md", b"a", JSONL, "uri", r"d: holds no data file; expected \.jsonl"),
    ("d/a.jsonl", b"\n", JSONL, "uri", r"d: holds no record"),
    ("d/test.jsonl", PAIR, JSONL, "split", r"d: holds the split test \(test\.jsonl\) and no other"),
    ("d/train.jsonl", PAIR, f'{JSONL}\nsplit = "tset"', "split", r"d: has no split 'tset'; the splits here: train"),
    ("d", PAIR, 'type = "text"\npattern = "*.md"', "pattern", r"is one file, which pattern = '\*.md' does not match"),
    ("d/a.txt", b"a", 'type = "text"\nsplit = "train"', "split", r"has no split 'train'; the splits here: none"),
    ("d/a.txt", "ä".encode("latin-1"), 'type = "text"', "uri", r"a\.txt:1: not valid UTF-8 \(byte 1 of the file\)"),
    ("d/a.txt", b"version https://git-lfs.github.com/spec/v1", 'type = "text"', "uri", r"a\.txt: is a pointer of Git LFS"),
    ("d/a.jsonl", PAIR, 'type = "mbpp"\nsplit = "test"', "split", r"has no split 'test'; the splits here: none"),
    ("d/a.jsonl", b"PAR1\x15\x04\x00", JSONL, "uri", r"a\.jsonl: is no \.jsonl file by its content; name it \.parquet"),
    ("d/a.arrow", b"\xff\xff\xff\xff\x10\0\0\0", JSONL, "uri", r"a\.arrow: does not end as \.arrow files do: it was cut off"),
    ("d/a.parquet", b"PAR1\x15\x04\x00", JSONL, "uri", r"a\.parquet: does not end as \.parquet files do: it was cut off"),
    ("d/a.jsonl.gz", PAIR, JSONL, "uri", r"a\.jsonl\.gz: damaged or truncated \.gz file"),
]


@pytest.mark.parametrize(("name", "content", "table", "key", "message"), CASES)
def test_a_wrong_file_is_said_by_check(tmp_path, name, content, table, key, message):
    config = write(tmp_path, {name: content}, f'[datasets.mine]\nuri = "DATA"\n{table}\n')
    with pytest.raises(ConfigError, match=rf"^{config}:\d+: datasets\.mine\.{key}: .*{message}"):
        check_loaded(load(config, ()))


def test_records_in_the_loader_of_texts(tmp_path):
    config = write(tmp_path, {"d.jsonl": PAIR}, '[datasets.mine]\nuri = "DATA.jsonl"\ntype = "text"\n')
    with pytest.raises(ConfigError, match=r"datasets\.mine\.type: 'text' would read .* write type = 'jsonl' or 'chat'"):
        check_loaded(load(config, ()))
    config.write_text(config.read_text() + 'pattern = "*.jsonl"\n')
    check_loaded(load(config, ()))


def test_what_passes(tmp_path):
    table = '[datasets.mine]\nuri = "DATA"\ntype = "jsonl"\n'
    config = write(tmp_path, {"d/a.jsonl": b"{\n" + PAIR}, table)
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: not valid JSON"):
        check_loaded(load(config, ()))
    # bad lines are left out: one that is good tells that it is the right file
    check_loaded(load(config, ["data.train.on_bad_example=skip"]))
    (tmp_path / "d" / "a.jsonl").write_bytes(b"{\n" * 2000)
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: not valid JSON"):
        check_loaded(load(config, ["data.train.on_bad_example=skip"]))
    # of the evaluation data too, and of one inside another, but not of what the run does not read
    used = '[datasets.other]\ntype = "mutated"\n[datasets.other.of]\ntype = "jsonl"\nuri = "DATA"\n'
    config = write(tmp_path, {"d/a.jsonl": TALK}, used)
    with pytest.raises(ConfigError, match=rf"{config}:\d+: datasets\.other\.of\.uri: .*it is a conversation"):
        check_loaded(load(config, ()))
    check_loaded(load(config, ['datasets.py={type="python-source"}', 'data.train.sources=["py"]']))


def test_check_reads_tables_without_torch(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "d").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(TALK)]), tmp_path / "d" / "a.parquet")
    config = write(tmp_path, {}, '[datasets.mine]\nuri = "DATA"\ntype = "jsonl"\n')
    code = (
        "import sys; from wmtp.cli import run_from_shell\n"
        "try: run_from_shell()\n"
        "except SystemExit as end: print(end.code, *{'torch', 'transformers', 'mlflow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, "check", config], capture_output=True, text=True)
    assert done.stdout.strip() == "2"
    assert 'a.parquet: row 1: no "prompt"' in done.stderr


def test_check_warns_of_missing_shards(tmp_path):
    config = write(tmp_path, {"d/train-00000-of-00002.jsonl": PAIR}, '[datasets.mine]\nuri = "DATA"\ntype = "jsonl"\n')
    said = f"datasets.mine.uri: {tmp_path}/d/train: 1 of 2 shards are here; missing: 1 (from 0)"
    assert said in check(config).warnings


@pytest.mark.parametrize(
    ("record", "table", "unread", "typo"),
    [
        ({"prompt": "a", "completion": "b", "weight": [1]}, JSONL, "weight", ("weight", "weights")),
        (
            {"text": "a", "is_corect": True, "idx": 1, "context": "c"},
            JSONL,
            "is_corect, idx, context",
            ("is_corect", "is_correct"),
        ),
        ({"text": "a", "idx": 1, "id": "a", "weights": None}, JSONL, "idx", None),
        ({"text": "a", "score": 1}, JSONL + '\nkeys = { reward = "score", id = "" }', "none", None),
        ({**json.loads(TALK), "rewards": 1, "prompt": "a"}, 'type = "chat"', "rewards, prompt", ("rewards", "reward")),
        ({**json.loads(TALK), "tools": None, "id": 3}, 'type = "chat"', "none", None),
    ],
)
def test_keys_that_nothing_reads_are_named(tmp_path, record, table, unread, typo):
    content = "".join(json.dumps(each) + "\n" for each in (record, record)).encode()
    found = check(write(tmp_path, {"d/a.jsonl": content}, f'[datasets.mine]\nuri = "DATA"\n{table}\n'))
    assert found.summary["unread keys"] == (unread if unread == "none" else f"datasets.mine: {unread}")
    said = [warning for warning in found.warnings if "which nothing reads" in warning]
    wanted = (
        []
        if typo is None
        else ["datasets.mine.keys: the records have \"{}\", which nothing reads; did you mean '{}'?".format(*typo)]
    )
    assert [warning.partition(" Rename")[0] for warning in said] == wanted
