"""Odd files of others: links, names, values that no Python object holds; none is dropped in silence, and none a crash."""

import csv
import gzip
import json
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from wmtp.data.base import BadExample
from wmtp.data.config import Chat, Jsonl, PythonSource, TextFiles
from wmtp.data.splits import data_files
from wmtp.errors import InputError, WMTPError

TEXT = b'{"text": "a"}\n'
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def write(folder, *names, content=TEXT):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(config, path) -> list[Any]:
    return list(config.build().examples(path))


def arrow(path, table):
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    "names",
    [
        ["testset.jsonl", "trainset.jsonl"],
        ["test_split.jsonl", "train_split.jsonl"],
        ["testData.jsonl", "trainData.jsonl"],
        ["held-out.jsonl", "train.jsonl"],
        ["hold_out_2.jsonl", "train.jsonl"],
        ["tests.jsonl", "train.jsonl"],
        ["train.jsonl", "validate.jsonl"],
        ["corpus.jsonl", "corpus_devset.jsonl"],
        ["a.jsonl", "testset/b.jsonl"],
    ],
)
def test_what_is_kept_for_measuring_is_not_trained_on(tmp_path, names):
    with pytest.raises(InputError, match=r"holds the split.*; write which of them is read, as split = "):
        data_files(write(tmp_path, *names))


@pytest.mark.parametrize(
    "names", [["dataset.jsonl", "subset.jsonl"], ["withheld_outputs.jsonl"], ["devils.jsonl", "fasttest.jsonl"]]
)
def test_words_that_only_look_like_splits(tmp_path, names):
    assert [file.name for file in data_files(write(tmp_path, *names))] == names


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (Jsonl(uri=""), ["a.jsonl", "b.jsonl"]),
        (Jsonl(uri=""), ["train/a.jsonl", "train/b.jsonl"]),
        (TextFiles(uri=""), ["a.txt", "b.txt"]),
        (PythonSource(uri=""), ["a.py", "b.py"]),
    ],
)
def test_a_link_to_nothing_is_not_passed_over(tmp_path, config, names):
    write(tmp_path, names[0])
    (tmp_path / names[1]).symlink_to("/nowhere/blob")
    with pytest.raises(InputError, match=rf"{names[1]}: is a link to /nowhere/blob, which is not there; fetch that, or remove"):
        config.build().files(tmp_path)


@pytest.mark.parametrize(
    ("config", "inside"), [(TextFiles(uri=""), "b.txt"), (PythonSource(uri=""), "b.py"), (Jsonl(uri=""), "b.jsonl")]
)
def test_linked_folders_are_read_once(tmp_path, config, inside):
    write(tmp_path / "elsewhere", inside)
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked again").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(".")
    assert config.build().files(tmp_path / "data") == [folder / "linked" / inside]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.jsonl", "README.md", ".cache/b.jsonl", "LICENSE", "dataset_info.json"], None),
        (["a.jsonl", "b/c.jsonl", "d.jsonl/part-0.json"], "the folders b, d.jsonl in it hold data that is not read"),
        (["a.jsonl", "b.jsonl.zip", "c.jsonl.incomplete"], "b.jsonl.zip, c.jsonl.incomplete in it is not read"),
        (["train.jsonl", "test.jsonl", "more/train.jsonl"], "the folders more in it hold data"),
    ],
)
def test_what_lies_beside_the_data_and_is_not_read_is_said(tmp_path, names, said):
    write(tmp_path, *names)
    doubts = Jsonl(uri="", split="train" if "train.jsonl" in names else None).build().doubts(tmp_path)
    assert [said in doubt for doubt in doubts] == ([] if said is None else [True])


def test_an_empty_file_among_others_is_said(tmp_path):
    write(tmp_path, "train-00000-of-00002.jsonl.gz", content=gzip.compress(TEXT))
    write(tmp_path, "train-00001-of-00002.jsonl.gz", content=b"")
    (doubt,) = Jsonl(uri="").build().doubts(tmp_path)
    assert doubt == f"{tmp_path}/train-00001-of-00002.jsonl.gz: is empty; was it fetched whole?"


@pytest.mark.parametrize("name", ["a.arrow", "a.arrow.gz"])
def test_a_stream_cut_between_two_batches_is_not_whole_nor_are_two_that_were_joined(tmp_path, name):
    table = pyarrow.table({"text": [f"text {n}" for n in range(600)]})
    written = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(written, table.schema) as writer:
        writer.write_table(table, max_chunksize=200)
    content = written.getvalue().to_pybytes()
    mark = b"\xff\xff\xff\xff\0\0\0\0"
    assert content.endswith(mark)

    def stored(content):
        write(tmp_path, name, content=gzip.compress(content) if name.endswith(".gz") else content)
        return read(Jsonl(uri=""), tmp_path)

    assert [example.completion for example in stored(content)] == table["text"].to_pylist()
    packed = name.endswith(".gz")  # its end is known when it has been read
    plain = r"a\.arrow: does not end as \.arrow files do: it was cut off, joined with another"
    with pytest.raises(WMTPError, match=r"a\.arrow\.gz: has no end-of-stream marker: it was cut off" if packed else plain):
        stored(content.removesuffix(mark))
    with pytest.raises(WMTPError, match=r"a\.arrow\.gz: holds more behind the end of its stream" if packed else plain):
        stored(content + b"more")
    with pytest.raises(WMTPError, match=r"a\.arrow.*: holds more behind the end of its stream"):
        stored(content + content)


TWICE = '{"prompt": "q", "completion": "right", "completion": "wrong"}'
NESTED = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]}'


@pytest.mark.parametrize(("config", "line", "key"), [(Jsonl(uri=""), TWICE, "completion"), (Chat(uri=""), NESTED, "content")])
def test_a_key_that_is_there_twice(tmp_path, config, line, key):
    write(tmp_path, "a.jsonl", content=line.encode() + b"\n")
    (bad,) = read(config, tmp_path)
    assert (bad.where, bad.problem) == (
        f"{tmp_path}/a.jsonl:1",
        f'not valid JSON: an object has the key "{key}" twice; leave one out',
    )
    (tmp_path / "a.jsonl").unlink()
    write(tmp_path, "a.json", content=f"[{line}]".encode())
    with pytest.raises(InputError, match=f'the key "{key}" twice'):
        read(config, tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.ndjson", "a.jsonlines"])
def test_lines_of_json_under_other_names(tmp_path, name):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\n{"text"\n'
    write(tmp_path, name, content=gzip.compress(content) if name.endswith(".gz") else content)
    first, second, bad = read(Jsonl(uri=""), tmp_path)
    assert (first.completion, second.completion, second.id) == ("a", "b", f"{name}:3")
    assert isinstance(bad, BadExample)
    assert f"{name}:4: not valid JSON" in str(bad)


@pytest.mark.parametrize("content", [b'{"data":\n[{"text": "a"}]}', b'[\n{"text": "a"}]', b'{"data": [{"text": "a"}]}\n'])
def test_one_json_value_over_lines_is_one(tmp_path, content):
    assert [example.completion for example in read(Jsonl(uri=""), write(tmp_path, "a.json", content=content))] == ["a"]


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([1, 2**62], pyarrow.timestamp("s")),
        pyarrow.array([1, 2**31 - 1], pyarrow.date32()),
        pyarrow.array([1, 2], pyarrow.timestamp("s", "Mars/Olympus")),
        pyarrow.StringArray.from_buffers(2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")),
    ],
    ids=["time", "date", "zone", "text"],
)
def test_a_value_that_python_has_not_spoils_no_row_that_does_not_need_it(tmp_path, values):
    arrow(tmp_path / "a.arrow", pyarrow.table({"text": ["x", "y"], "id": values}))
    examples = read(Jsonl(uri=""), tmp_path)
    assert [example.completion for example in examples] == ["x", "y"]
    assert examples[1].id == "a.arrow: row 2"
    arrow(tmp_path / "a.arrow", pyarrow.table({"text": values}))
    assert any('text" must be a string, not a value that cannot be read' in str(bad) for bad in read(Jsonl(uri=""), tmp_path))


def test_a_table_joined_of_texts_and_pairs(tmp_path):
    rows = [{"text": "a"}, {"prompt": "q", "completion": "b"}, {}, {"text": "t", "prompt": "q", "completion": "c"}]
    columns = {name: [row.get(name) for row in rows] for name in ("text", "prompt", "completion")}
    arrow(tmp_path / "a.arrow", pyarrow.table(columns))
    text, pair, empty, both = read(Jsonl(uri=""), tmp_path)
    assert (text.prompt, text.completion, pair.prompt, pair.completion) == ("", "a", "q", "b")
    assert 'row 3: no "prompt"; needs "prompt" and "completion", or "text"' in str(empty)
    assert 'has both "text" and "prompt"' in str(both)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_column_twice_in_a_table_is_refused(tmp_path, form):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    (pyarrow.parquet.write_table if form == "parquet" else lambda table, path: arrow(path, table))(
        table, tmp_path / f"a.{form}"
    )
    with pytest.raises(InputError, match=r"has the column 'text' twice; leave one out"):
        read(Jsonl(uri=""), tmp_path)


def test_messages_of_a_table_without_lists_are_json(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps([USER, ANSWER])], ["a talk"], ["[{'role': 'user'}]"]])
    good, text, python = read(Chat(uri=""), tmp_path)
    assert [message["content"] for message in good.messages] == ["q", "a"]
    assert '"messages" must be a list of messages, not a text' in str(text)
    assert '"messages": is a text, but not JSON' in str(python)


def test_text_in_messages_that_nothing_reads_is_named(tmp_path):
    records = [{"messages": [USER, {**ANSWER, "thought": "hm", "copy": "a", "score": 1}]}]
    write(tmp_path, "a.jsonl", content="\n".join(map(json.dumps, records)).encode())
    (example,) = read(Chat(uri=""), tmp_path)
    assert example.unread == ("messages[].thought",)


def test_arguments_of_a_tool_that_are_encoded_twice(tmp_path):
    call = {"name": "f", "arguments": json.dumps(json.dumps({"a": 1}))}
    record = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}, ANSWER]}
    (bad,) = read(Chat(uri=""), write(tmp_path, "a.jsonl", content=json.dumps(record).encode()))
    assert "message 2, tool call 1: its arguments are JSON text of a text, not of an object" in str(bad)


@pytest.mark.parametrize(
    ("history", "wanted"),
    [
        (5, '"history" must be a list of pairs of request and answer, not a number'),
        ({"q": "a"}, '"history" must be a list of pairs of request and answer, not an object'),
        ("no list", '"history": is a text, but not JSON'),
        ('[["x", "y"]]', None),
        (None, None),
    ],
)
def test_a_history_of_another_form(tmp_path, history, wanted):
    record = {"instruction": "q", "output": "a", "history": history}
    (example,) = read(Chat(uri=""), write(tmp_path, "a.jsonl", content=json.dumps(record).encode()))
    if wanted is not None:
        assert wanted in str(example)
    else:
        assert len(example.messages) == (4 if history else 2)
