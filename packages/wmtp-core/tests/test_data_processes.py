"""Processes that encode give what this process gives, and leave nothing behind."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from wmtp.data import ahead
from wmtp.data.cache import token_store
from wmtp.data.config import Chat, Jsonl
from wmtp.errors import PluginError, WMTPError
from wmtp.tokenizers import processes, worker
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.tokenizers.hf import HfTokenizer
from wmtp.tokenizers.processes import EncodingProcess, Encodings

PAIRS = [
    *({"prompt": f"how much is {n} and {n}? ", "completion": f"it is {2 * n}, {'é 🙂' * (n % 3)}"} for n in range(60)),
    {"text": "a plain text"},
    {"prompt": "", "completion": "an answer"},
    {"completion": "no prompt"},
    {"prompt": "weighted ", "completion": "as told", "weights": [["as ", 1.0], ["told", 0.5]]},
]
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": f"say {n} é"}, {"role": "assistant", "content": "🙂 " * n + str(n)}]}
    for n in range(1, 40)
]


@pytest.fixture
def started(monkeypatch):
    """Start three processes once some documents are encoded; the processes that were started."""
    found = []

    class Noted(EncodingProcess):
        def __init__(self, settings):
            super().__init__(settings)
            found.append(self._process)

    monkeypatch.setattr(processes, "EncodingProcess", Noted)
    monkeypatch.setattr(processes, "_WORTH", 400)
    monkeypatch.setattr(ahead, "_CHARACTERS", 200)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    return found


def spaced(folder):
    """A tokenizer that puts a space before a text, so that the start of a document is encoded otherwise than the rest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [json.dumps(record, ensure_ascii=False) for record in PAIRS]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=150, special_tokens=["</s>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(str(folder))
    return HfTokenizer(folder)


def made(folder, config, tokenizer, name, bad="skip", **options):
    """Tokenize the data set of a config into a cache of its own."""
    data = folder / "data.jsonl"
    return token_store("data", config, data, tokenizer, cache_dir=folder / name, on_bad_example=bad, **options)


def written(folder, records, *more):
    path = folder / "data.jsonl"
    path.write_text("\n".join([*map(json.dumps, records), *more]) + "\n")
    return str(path)


@pytest.mark.parametrize("form", ["pairs", "together", "conversations"])
def test_processes_give_the_same_store(tmp_path, monkeypatch, started, form):
    if form == "conversations":
        tokenizer, options = chat_tokenizer(tmp_path / "t", TEMPLATES["chatml"]), {}
        config = Chat(uri=written(tmp_path, CONVERSATIONS))
    else:
        tokenizer, options = spaced(tmp_path / "t"), {"boundary": "together" if form == "together" else "apart"}
        config = Jsonl(uri=written(tmp_path, PAIRS, "no JSON", r'{"text": "half \ud800 a pair"}'))
    found = made(tmp_path, config, tokenizer, "processes", **options)
    assert 1 <= len(started) <= 3
    assert all(process.poll() == 0 for process in started), "a process is left"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    alone = made(tmp_path, config, tokenizer, "alone", **options)
    assert len(started) <= 3, "TOKENIZERS_PARALLELISM is not respected"
    assert (found.info.digest, found.info.bad_messages, found.info.notes) == (
        alone.info.digest,
        alone.info.bad_messages,
        alone.info.notes,
    )
    assert len(found) > 30


def test_a_process_that_is_killed_is_done_without(tmp_path, monkeypatch, started, caplog):
    tokenizer, config = spaced(tmp_path / "t"), Jsonl(uri=written(tmp_path, PAIRS[:60]))
    encode = EncodingProcess.encode_many

    def killed_once(self, texts, *, first=False):
        if len(started) == 1:
            os.kill(self._process.pid, signal.SIGKILL)
        return encode(self, texts, first=first)

    monkeypatch.setattr(EncodingProcess, "encode_many", killed_once)
    with caplog.at_level(logging.WARNING, "wmtp"):
        found = made(tmp_path, config, tokenizer, "killed")
    assert caplog.text.count("a process that tokenizes has ended") == 1
    assert all(process.poll() is not None for process in started)
    monkeypatch.setattr(processes, "_WORTH", 1 << 60)
    assert found.info.digest == made(tmp_path, config, tokenizer, "alone").info.digest


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "whole = worker._answer; worker._answer = lambda backend, texts, **kind: whole(backend, texts[:1], **kind)",
            "of 1 texts",
        ),
        ("print('a greeting of sitecustomize', flush=True)", "something else than tokens came from it"),
    ],
)
def test_a_process_that_answers_something_else_is_done_without(tmp_path, monkeypatch, started, caplog, fault, said):
    tokenizer, config = spaced(tmp_path / "t"), Jsonl(uri=written(tmp_path, PAIRS[:60]))
    folder = Path(worker.__file__).parent
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(folder)!r})\nimport worker\n{fault}\nworker.main()\n")
    monkeypatch.setattr(worker, "__file__", str(program))
    with caplog.at_level(logging.WARNING, "wmtp"):
        found = made(tmp_path, config, tokenizer, "odd")
    assert said in caplog.text
    assert started
    assert all(process.poll() is not None for process in started), "a process is left"
    monkeypatch.setattr(processes, "_WORTH", 1 << 60)
    assert found.info.digest == made(tmp_path, config, tokenizer, "alone").info.digest


def test_a_tokenizer_that_gives_too_few_lists_is_named(tmp_path):
    class Few(BytesTokenizer):
        def encode_many(self, texts, *, first=False):
            return super().encode_many(texts[:2], first=first)

    with pytest.raises(PluginError, match=r"the tokenizer .*Few gave the tokens of 2 texts for \d+"):
        made(tmp_path, Jsonl(uri=written(tmp_path, PAIRS[:60])), Few(), "cache")


def test_processes_that_cannot_be_started_are_done_without(tmp_path, monkeypatch, started, caplog):
    monkeypatch.setattr(processes.sys, "executable", str(tmp_path / "none"))
    with caplog.at_level(logging.WARNING, "wmtp"):
        found = made(tmp_path, Jsonl(uri=written(tmp_path, PAIRS[:60])), spaced(tmp_path / "t"), "cache")
    assert len(found) == 60
    assert 1 <= caplog.text.count("a process that tokenizes has ended") <= 3


def test_processes_end_where_the_data_is_refused(tmp_path, started):
    config = Jsonl(uri=written(tmp_path, PAIRS[:60], *["no JSON"] * 20))
    with pytest.raises(WMTPError, match="examples cannot be read"):
        made(tmp_path, config, spaced(tmp_path / "t"), "cache", bad="error")
    assert started
    assert all(process.poll() == 0 for process in started)


def test_a_tokenizer_that_is_no_backend_starts_none(tmp_path, started):
    class Derived(HfTokenizer):
        def encode(self, text):
            return super().encode(text.lower())

    spaced(tmp_path / "t")
    for tokenizer in (BytesTokenizer(), Derived(tmp_path / "t")):
        with Encodings(tokenizer) as encodings:
            encodings._characters = processes._WORTH - 1
            encodings._start_processes()
            assert encodings._pool is None
    assert not started
