"""The token cache: reused, keyed, damaged, killed while it is built, built twice at once."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import attrs
import pytest
from prepared import PAIRS, CountingTokenizer, prepare, prepare_file, texts, write_lines

from wmtp.data.base import Example, ExampleLoader
from wmtp.data.cache import token_store
from wmtp.data.config import Jsonl
from wmtp.data.loaders.jsonl import JsonlLoader
from wmtp.errors import WMTPError
from wmtp.plugins.contract import DataLoaderConfig
from wmtp.tokenizers.bytes import BytesTokenizer


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


class UpperCaseTokenizer(BytesTokenizer):
    def encode(self, text):
        return super().encode(text.upper())

    def fingerprint(self):
        return "upper"


def test_the_second_preparation_tokenizes_nothing(tmp_path):
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


#: a loader as a cell of a notebook defines it: without a file
CELL = """
BEGIN = {begin!r}

def text(number):
    return f"{{BEGIN}} {{number}}{end}"

class Loader(ExampleLoader):
    def examples(self, path):
        for number in range(3):
            yield Example(id=str(number), completion=text(number){more})

@attrs.frozen(kw_only=True)
class Config(DataLoaderConfig):
    type = "cell"

    def build(self):
        return Loader()
"""


def test_a_loader_that_a_cell_defines_anew_is_read_anew(tmp_path):
    def made(tokenizer, **changes):
        space = {**globals(), "__name__": "a_notebook"}
        exec(CELL.format(**{"begin": "n", "end": "!", "more": ""} | changes), space)
        return texts(prepare(tmp_path, {"d": space["Config"]()}, {"d": None}, tokenizer).train)

    tokenizer = CountingTokenizer()
    assert made(tokenizer) == ["n 0!", "n 1!", "n 2!"]
    calls = tokenizer.calls
    assert made(tokenizer) == ["n 0!", "n 1!", "n 2!"]
    assert tokenizer.calls == calls
    # in its own method, in a function that it calls, in a value that this one names
    assert made(tokenizer, more=" * 2")[1] == "n 1!n 1!"
    assert made(tokenizer, end="?")[1] == "n 1?"
    assert made(tokenizer, begin="m")[1] == "m 1!"


def test_a_changed_byte_or_tokenizer_or_key_is_tokenized_anew(tmp_path):
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


def test_a_full_disk_is_said_as_such(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(WMTPError, match="token cache cannot be written"):
        prepare_file(tmp_path, path)
