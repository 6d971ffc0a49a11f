"""Data files as others publish them: splits, tables, what `save_to_disk` writes, and what is too large to read."""

import bz2
import gzip
import json
import lzma
import tracemalloc
from decimal import Decimal

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from wmtp.data import compression, splits
from wmtp.data.base import BadExample
from wmtp.data.config import Chat, HumanEval, Jsonl, TextFiles
from wmtp.data.files import read_records
from wmtp.data.splits import data_files
from wmtp.errors import InputError, WMTPError

RECORDS = [{"prompt": f"{n} + 1 =", "completion": f' "{n + 1}",\nso', "id": float(n)} for n in range(3)]


def write(folder, *names, content=b'{"text": "a"}\n'):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def found(folder, split=None):
    return [file.relative_to(folder).as_posix() for file in data_files(folder, split)]


def read(config, path):
    examples = list(config.build().examples(path))
    assert not [example for example in examples if isinstance(example, BadExample)], examples
    return examples


# splits


@pytest.mark.parametrize(
    ("names", "split", "files"),
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"], "train", [0, 1]),
        (["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "data/test-00000-of-00001.parquet"], "test", [1]),
        (["train.jsonl", "test.jsonl", "valid.jsonl", "dataset_info.json", "README.md"], "validation", [2]),
        (["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl"], "train", [0, 1]),
        (["data/dev/0000.parquet", "data/train/0000.parquet"], "dev", [0]),
        (["c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"], "train", [0]),
        (["squad-train.arrow", "squad-validation.arrow"], "train", [0]),
        ([f"{name}-00000-of-00001.parquet" for name in ("test_gen", "train_gen", "train_sft")], "train_sft", [2]),
        (["my_test.jsonl", "my_train.jsonl"], "train", [1]),
        (["train_1.jsonl", "train_2.jsonl", "test_1.jsonl"], "train", [0, 1]),
        (["TRAIN.JSONL", "Test.Jsonl.GZ"], "train", [0]),
        (["train/0/a.jsonl", "train/1/b.jsonl", "train/.tmp/c.jsonl", "dev/a.jsonl"], "train", [0, 1]),
        (["eval.jsonl", "test.jsonl", "train.jsonl"], "eval", [0]),
        (["eval.jsonl", "test.jsonl", "train.jsonl"], "test", [1]),
        (["dev.jsonl", "train.jsonl", "validation.jsonl"], "validation", [2]),
        (["heldout.jsonl", "train.jsonl"], "train", [1]),
    ],
)
def test_the_files_of_a_split_are_chosen_and_one_must_be_named(tmp_path, names, split, files):
    write(tmp_path, *names)
    assert found(tmp_path, split) == [names[number] for number in files]
    with pytest.raises(
        InputError, match=f"holds the splits .*{split if split != 'dev' else 'validation'}.*write which"
    ) as error:
        found(tmp_path)
    assert error.value.key == "split"
    with pytest.raises(InputError, match="has no split 'sample'; the splits here: "):
        found(tmp_path, "sample")


@pytest.mark.parametrize(
    "names",
    [
        ["a-00000-of-00002.parquet", "a-00001-of-00002.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "dataset_info.json"],
        ["train_1.jsonl", "train_2.jsonl"],
        ["contest.jsonl", "evaluated.jsonl", "latest.jsonl"],
        ["data/a.jsonl", "data/b.jsonl"],
        ["notes.jsonl", "train.jsonl"],
    ],
)
def test_a_folder_without_a_choice_is_read_whole(tmp_path, names):
    write(tmp_path, *names)
    assert found(tmp_path) == [name for name in names if "info" not in name]


def test_a_folder_with_a_test_file_alone_is_not_learned_from_by_accident(tmp_path):
    write(tmp_path, "test.jsonl")
    with pytest.raises(InputError, match=r"holds the split test \(test.jsonl\) and no other; .* split = 'test'"):
        found(tmp_path)
    assert found(tmp_path, "test") == ["test.jsonl"]
    assert data_files(tmp_path / "test.jsonl") == [tmp_path / "test.jsonl"]  # named by itself
    with pytest.raises(InputError, match="is one file, of which split = 'train' chooses nothing"):
        data_files(tmp_path / "test.jsonl", "train")


def test_folders_inside_that_hold_data_are_named(tmp_path, monkeypatch):
    write(tmp_path, "main/train.jsonl", "socratic/train.jsonl", "images/a.png")
    with pytest.raises(InputError, match="holds no data file; the folders main, socratic in it do"):
        found(tmp_path)

    write(tmp_path / "deep", "data/en/train.jsonl")
    with pytest.raises(InputError, match=r"holds no data file; the folders data/en in it do: name one of them"):
        data_files(tmp_path / "deep")

    write(tmp_path / "home", ".cache/train.jsonl", *(f"f{number}/a.png" for number in range(5)), "last/train.jsonl")
    with pytest.raises(InputError, match="holds no data file; the folders last in it do"):
        data_files(tmp_path / "home")
    monkeypatch.setattr(splits, "_MOST_FOLDERS", 4)  # a whole disk is not searched
    with pytest.raises(InputError, match="holds no data file; expected"):
        data_files(tmp_path / "home")


def test_splits_of_one_kind_are_told_apart(tmp_path):
    write(tmp_path, "train.jsonl", "val.jsonl", "dev.jsonl")
    with pytest.raises(InputError, match=r"has no split 'validation'; the splits here: dev, train, val$"):
        data_files(tmp_path, "validation")


def test_a_file_beside_its_compressed_copy_is_not_read_twice(tmp_path):
    write(tmp_path, "a.jsonl", "train.jsonl", "train.jsonl.gz")
    with pytest.raises(InputError, match=r"holds train\.jsonl and train\.jsonl\.gz, which would be read both; keep one"):
        data_files(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "other-1-of-3.jsonl"], None),
        (["train-00001-of-00002.jsonl"], "1 of 2 shards are here; missing: 0 (from 0)"),
        (["c4-train.00003-of-01024.jsonl"], "1 of 1024 shards are here; missing: 0, 1, 2, 4, 5, 6, 7, 8 … (from 0)"),
        (
            ["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            "there are shards of 1 and of 2, which may hold the same records; keep those of one",
        ),
    ],
)
def test_missing_shards_are_said(tmp_path, names, said):
    write(tmp_path, *names)
    doubts = Jsonl(uri=str(tmp_path)).build().doubts(tmp_path)
    assert [doubt.partition(": ")[2] for doubt in doubts] == ([] if said is None else [said])


def test_humaneval_is_a_test_split(tmp_path):
    write(tmp_path, "test-00000-of-00001.jsonl", "prompt-00000-of-00001.jsonl")
    assert [file.name for file in HumanEval(uri="").build().files(tmp_path)] == ["test-00000-of-00001.jsonl"]


@pytest.mark.parametrize(
    "names", [["wiki.test.txt", "wiki.train.txt"], ["test/a.txt", "train/a.txt"], ["test.txt", "train.txt"]]
)
def test_splits_of_text_files(tmp_path, names):
    write(tmp_path, *names, content=b"some text")
    assert [e.id for e in read(TextFiles(uri="", split="train"), tmp_path)] == [names[1]]
    with pytest.raises(InputError, match=r"holds the splits test .*, train "):
        read(TextFiles(uri=""), tmp_path)


def test_titles_of_texts_are_no_splits(tmp_path):
    names = ["A Test of Time.txt", "plays/dev-val-train.txt", "the_test.txt"]
    write(tmp_path, *names, content=b"some text")
    assert [e.id for e in read(TextFiles(uri=""), tmp_path)] == names


# forms


def write_arrow(path, rows, *, stream=True):
    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table)


def test_csv_has_quotes_and_line_breaks_in_cells(tmp_path):
    content = 'id,prompt,completion,is_correct,reward,weights\n7,"a, ""b""\n\nc",d,true,0.5,\n\n,e,,,,"[[""f"", 2]]"\n'
    for name, data in (("a.csv", content), ("b.csv.gz", content), ("c.csv", "﻿" + content.replace("\n", "\r\n"))):
        path = tmp_path / name
        path.write_bytes(gzip.compress(data.encode(), mtime=0) if name.endswith(".gz") else data.encode())
        first, second = read(Jsonl(uri=""), path)
        assert (first.id, first.prompt, first.completion, first.is_correct, first.reward) == (
            "7",
            'a, "b"\n\nc',
            "d",
            True,
            0.5,
        )
        assert first.weights is None
        assert type(first.prompt) is str
        assert second.where == f"{path}:6"
        assert (second.prompt, second.completion, second.is_correct, second.reward) == ("e", "", None, None)
        assert second.weights == (("f", 2.0),)


def test_bad_rows_of_csv_are_told_from_good_ones(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,reward\ngood,1\nbad\n"b"ad,1\nb\xffd,1\nbad,high\n"good\ngood",\n')
    examples = list(Jsonl(uri="").build().examples(path))
    bad = [str(example) for example in examples if isinstance(example, BadExample)]
    assert [example.completion for example in examples if not isinstance(example, BadExample)] == ["good", "good\ngood"]
    for line, message in enumerate(
        ("has 1 cells, and there are 2 columns (text, reward)", "not valid CSV: ", "not valid UTF-8"), 3
    ):
        assert bad[line - 3].startswith(f"{path}:{line}: {message}")
    assert (
        bad[3]
        == f'{path}:6: "reward" must be a number, not \'high\'; if it is something else, leave it out: keys = {{ reward = "" }}'
    )
    (tmp_path / "b.tsv").write_text("text\treward\na, b\t2\n")
    assert [(e.completion, e.reward) for e in read(Jsonl(uri=""), tmp_path / "b.tsv")] == [("a, b", 2.0)]


def test_decimal_numbers_of_a_table_are_numbers(tmp_path):
    table = pyarrow.table({"text": ["a", "b"], "reward": pyarrow.array([Decimal("0.5"), None])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [example.reward for example in read(Jsonl(uri=""), tmp_path / "a.parquet")] == [0.5, None]


@pytest.mark.parametrize("form", ["stream.arrow", "file.arrow", "packed.arrow.gz", "a.parquet"])
def test_tables_are_read_in_slices(tmp_path, form):
    rows = [{**record, "reward": 0.5 if number else float("nan")} for number, record in enumerate(RECORDS)] * 200
    path = tmp_path / form
    if form == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_arrow(tmp_path / "x.arrow", rows, stream=form == "stream.arrow")
        data = (tmp_path / "x.arrow").read_bytes()
        path.write_bytes(gzip.compress(data) if form.endswith(".gz") else data)
    examples = read(Jsonl(uri=""), path)
    assert [e.completion for e in examples] == [row["completion"] for row in rows]
    assert [e.reward for e in examples[:2]] == [None, 0.5]
    assert examples[400].where == f"{path}: row 401"
    assert examples[1].id == "1"


def saved(folder, rows, split):
    """Write what `save_to_disk` writes."""
    write_arrow(folder / "data-00000-of-00001.arrow", rows)
    write_arrow(folder / "cache-0123456789abcdef.arrow", [{"other": 1}])
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_what_save_to_disk_writes_is_read(tmp_path):
    one = saved(tmp_path / "one", RECORDS, "train")
    assert [e.completion for e in read(Jsonl(uri=""), one)] == [record["completion"] for record in RECORDS]
    both = tmp_path / "both"
    saved(both / "train", RECORDS, "train")
    saved(both / "test", RECORDS[:1], "test")
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(read(Jsonl(uri="", split="train"), both)) == 3
    with pytest.raises(InputError, match=r"holds the splits test .*, train .*; write which"):
        read(Jsonl(uri=""), both)
    with pytest.raises(InputError, match=r"holds the split test .* and no other"):
        read(Jsonl(uri=""), both / "test")
    (one / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(WMTPError, match=r"data-00000-of-00001\.arrow missing, which state\.json names"):
        read(Jsonl(uri=""), one)


def test_messages_in_arrow_have_no_nulls(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}]
    write_arrow(tmp_path / "a.arrow", [{"messages": messages}])
    (example,) = read(Chat(uri=""), tmp_path)
    assert example.messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


# odd values of what need not be there


@pytest.mark.parametrize(
    ("value", "name"),
    [(3.0, "3"), (1.5, "1.5"), ("a", "a"), (True, "True"), ({"$oid": "x"}, '{"$oid": "x"}'), ([1, 2], "[1, 2]")],
)
def test_any_value_is_a_name(tmp_path, value, name):
    write(tmp_path, "a.jsonl", content=json.dumps({"text": "a", "id": value, "group": value}).encode())
    (example,) = read(Jsonl(uri=""), tmp_path)
    assert (example.id, example.group) == (name, name)


def test_labels_in_numbers_and_columns_that_are_none(tmp_path):
    write(tmp_path, "a.jsonl", content=b'{"text": "a", "is_correct": 1.0, "reward": "high"}\n{"text": "b", "is_correct": 0}\n')
    first, second = read(Jsonl(uri="", keys={"reward": ""}), tmp_path)
    assert (first.is_correct, second.is_correct, first.reward) == (True, False, None)


# what is too large


def test_tables_with_empty_cells_write_labels_as_floats(tmp_path):
    write(tmp_path, "a.CSV", content=b",,text,is_correct,id\n0,0,a,1.0,1.0\n1,1,b,,\n2,2,c,0.0,2.5\n")
    examples = read(Jsonl(uri=str(tmp_path)), tmp_path)
    assert [(example.is_correct, example.id) for example in examples] == [(True, "1.0"), (None, "a.CSV:3"), (False, "2.5")]


TABLE = pyarrow.table({"text": ["a"]})


def _bytes(write_table):
    sink = pyarrow.BufferOutputStream()
    write_table(sink)
    return sink.getvalue().to_pybytes()


def _arrow(opened):
    with opened as writer:
        writer.write_table(TABLE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), r"is compressed; name it a\.jsonl\.gz"),
        ("a.csv", bz2.compress(b"text\na"), r"is compressed; name it a\.csv\.bz2"),
        ("a.json", lzma.compress(b"[]"), r"is compressed; name it a\.json\.xz"),
        ("a.csv", "text\nä".encode("utf-16"), r"is text in UTF-16; save it in UTF-8"),
        ("a.jsonl", '{"text": "ä"}'.encode("utf-16"), r"is text in UTF-16; save it in UTF-8"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1",
            r"a pointer of Git LFS, .*; run git lfs pull",
        ),
        ("a.csv", b"\n<!DOCTYPE html><html>", r"is a web page \(HTML\), not the data itself"),
        ("a.parquet", b'{"text": "a"}', r"is JSON by its content; name it \.jsonl"),
        ("a.arrow.gz", gzip.compress(b'{"text": "a"}', mtime=0), r"is JSON by its content; name it \.jsonl"),
        (
            "a.jsonl",
            _bytes(lambda sink: pyarrow.parquet.write_table(TABLE, sink)),
            r"is no \.jsonl file by its content; name it \.parquet",
        ),
        (
            "a.parquet",
            _bytes(lambda sink: _arrow(pyarrow.ipc.new_stream(sink, TABLE.schema))),
            r"is no \.parquet file by its content; name it \.arrow",
        ),
        (
            "a.csv",
            _bytes(lambda sink: _arrow(pyarrow.ipc.new_file(sink, TABLE.schema))),
            r"is no \.csv file by its content; name it \.arrow",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_another_format_is_refused_at_once(tmp_path, name, content, message):
    write(tmp_path, name, content=content)
    with pytest.raises(InputError, match=message):
        list(read_records([tmp_path / name]))


def test_the_last_shard_is_looked_at_before_the_first_is_read(tmp_path):
    write(tmp_path, "0.jsonl", "1.jsonl")
    write(tmp_path, "2.jsonl", content=b"<html>")
    with pytest.raises(InputError, match=r"2\.jsonl: is a web page"):
        next(Jsonl(uri=str(tmp_path)).build().first_examples(tmp_path))


def test_a_line_that_is_too_long_is_refused_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "MAX_LINE", 1000)
    monkeypatch.setattr(compression, "_PART", 1000)
    line = b'{"text": "' + b"a" * 5_000_000 + b'"}\n'
    write(tmp_path, "a.jsonl.gz", content=gzip.compress(b'{"text": "a"}\n' + line + b'{"text": "b"}\n'))
    tracemalloc.start()
    first, bad, last = read_records([tmp_path / "a.jsonl.gz"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first[1], last[1]) == ({"text": "a"}, {"text": "b"})
    assert str(bad).startswith(f"{tmp_path / 'a.jsonl.gz'}:2: longer than 128.0 MB, which is no record")
    assert peak < 1_000_000


@pytest.mark.parametrize("name", ["a.json.gz", "a.parquet.gz", "a.txt.gz"])
def test_a_file_that_is_read_at_once_has_a_bound(tmp_path, monkeypatch, name):
    monkeypatch.setattr(compression, "MAX_WHOLE", 1000)
    write(tmp_path, name, content=gzip.compress(b"a" * 100_000))
    config = TextFiles(uri="") if "txt" in name else Jsonl(uri="")
    with pytest.raises(WMTPError, match=f"{name}: holds more than 1.0 kB, and would be read at once"):
        read(config, tmp_path / name)


@pytest.mark.slow
def test_a_compressed_line_of_15_hundred_megabytes_is_refused(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(1500):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    bad, last = read_records([tmp_path / "a.jsonl.gz"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(bad, BadExample)
    assert last[1] == {"text": "b"}
    assert peak < 400_000_000
