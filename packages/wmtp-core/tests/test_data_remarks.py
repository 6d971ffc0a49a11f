"""Nothing is lost in silence: text that is not read, tokens that are cut off, a template that is not used."""

import pytest
from chat_tokenizers import CHATML, chat_tokenizer, prepare, write

from wmtp.data.base import Example
from wmtp.data.config import Chat, Jsonl
from wmtp.data.notes import Notes
from wmtp.data.render import Renderer
from wmtp.data.unread import unread_keys
from wmtp.tokenizers.bytes import BytesTokenizer

ALPACA = {"instruction": "add", "input": "1 and 2", "output": "3"}
RENAMED = {"prompt": "instruction", "completion": "output"}


def lines(caplog, level):
    return [record.message for record in caplog.records if record.levelname == level]


def said(caplog, tmp_path, records, *, tokenizer=None, level="WARNING", **options):
    caplog.clear()
    with caplog.at_level("INFO", "wmtp"):
        prepare(tmp_path, tokenizer or BytesTokenizer(), records, **options)
    return lines(caplog, level)


def test_what_alpaca_and_pairs_lose_with_other_keys_is_said_also_from_the_cache(tmp_path, caplog):
    records = [ALPACA, {**ALPACA, "input": ""}, {**ALPACA, "input": "4 and 5"}]
    for _ in range(2):
        (line,) = said(caplog, tmp_path, records, dataset=Jsonl(uri="", keys=RENAMED))
        assert line == (
            f"data.train: chat: 2 of 3 documents (the first at {tmp_path}/a.jsonl:1): "
            'text is under "input", which no key of the data set names: it is not read; type = "chat" reads such records whole'
        )
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    (line,) = said(caplog, tmp_path, [pair], dataset=Jsonl(uri="", keys={"completion": "chosen"}))
    assert 'text is under "rejected"' in line


def test_keys_that_are_unread_in_the_same_documents_are_in_one_line(tmp_path, caplog):
    records = [{"prompt": "q", "completion": "a", "topic": "sums", "notes": {"by": ["me"]}, "score": 3, "empty": " "}] * 2
    found = [line for line in said(caplog, tmp_path, records, level="INFO", dataset=Jsonl(uri="")) if "no key" in line]
    assert len(found) == 1
    assert 'text is under "topic", "notes", which no key' in found[0]
    assert said(caplog, tmp_path, [{"text": "ab", "topic": "x"}], dataset=Jsonl(uri="", keys={"id": "topic"})) == []


@pytest.mark.parametrize(
    ("record", "unread"),
    [
        (ALPACA, ()),
        ({**ALPACA, "text": "Instruction: add\n1 and 2\nResponse: 3"}, ()),  # holds a copy, with what stands between
        ({"prompt": "q", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ()),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "context": "c"}, ("context",)),
    ],
)
def test_chat_says_it_too_but_not_of_copies(tmp_path, record, unread):
    path = write(tmp_path / "a.jsonl", [record])
    format = "messages" if "messages" in record else None
    (example,) = Chat(uri="", format=format).build().examples(path)
    assert example.unread == unread


def test_pairs_of_which_the_chosen_is_asked_for_drop_nothing_unsaid(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad", "why": "rude"}])
    for answers in ("chosen", "both"):
        assert {example.unread for example in Chat(uri="", answers=answers).build().examples(path)} == {("why",)}


def test_a_text_is_known_if_it_is_within_what_is_read_or_holds_all_of_it():
    record = {"a": "hello", "b": ["bye"], "part": "ell", "whole": "say hello and bye", "half": "hello!", "other": 3, "id": "x"}
    assert unread_keys(record, ("a", "b"), {"id"}) == ("half",)


def test_notes_of_the_same_documents_are_joined_by_their_subjects():
    notes = Notes()
    for where in ("a:1", "a:2"):
        notes.add("under {}", where, subject='"x"')
        notes.add("under {}", where, subject='"y"')
    notes.add("under {}", "a:2", subject='"z"')
    notes.add("begins with '{}'", "a:3")
    assert [(note.text, note.count) for note in notes.list()] == [
        ('under "x", "y"', 2),
        ('under "z"', 1),
        ("begins with '{}'", 1),
    ]


# truncation


def test_what_truncation_takes_of_what_is_learned_is_counted_and_named(tmp_path, caplog):
    records = [
        {"prompt": "p", "completion": "c" * 20},
        {"prompt": "p", "completion": "c" * 70, "id": "own"},  # 72 tokens and begin: 9 too many
        {"prompt": "p" * 70, "completion": "c"},
    ]
    (line,) = said(caplog, tmp_path, records, dataset=Jsonl(uri=""))
    assert line == (
        "data.train: chat: data.train.max_length = 64 cuts off 11 tokens that would be learned, of 2 of 3 documents "
        "(the first: a.jsonl:2, 'own'); of 1 (the first: a.jsonl:3) all of them, and these are left out; "
        "raise max_length, or see data.train.overlong"
    )
    assert said(caplog, tmp_path, records, dataset=Jsonl(uri=""), overlong="split") == []
    assert said(caplog, tmp_path, records, dataset=Jsonl(uri=""), max_length=128) == []


def test_an_answer_that_is_cut_off_is_counted_for_conversations(tmp_path, caplog):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    turns = [("user", "q"), ("assistant", "a"), ("user", "q " * 60), ("assistant", "b")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (line,) = said(caplog, tmp_path, [record], tokenizer=tokenizer)
    assert "cuts off 2 tokens that would be learned, of 1 of 1 documents (the first: a.jsonl:1)" in line


# templates and special tokens


def test_a_template_that_the_data_does_not_use_is_said_in_one_line(tmp_path, caplog):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    (line,) = said(caplog, tmp_path, [{"prompt": "q", "completion": "a"}], tokenizer=tokenizer, dataset=Jsonl(uri=""))
    assert line == (
        "data.train: the model has a chat template, and chat is learned as plain text without it; a data set with "
        'type = "chat" is written by it'
    )
    rendered = {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "completion": "a<|im_end|>"}
    assert said(caplog, tmp_path, [rendered], tokenizer=tokenizer, dataset=Jsonl(uri="")) == []
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert said(caplog, tmp_path, [talk], tokenizer=tokenizer) == []
    tokenizer.chat_template = None
    assert said(caplog, tmp_path, [{"text": "some words"}], tokenizer=tokenizer, dataset=Jsonl(uri="")) == []


class Begins(BytesTokenizer):
    """A tokenizer in whose texts ``<s>`` is the begin token."""

    def encode(self, text):
        first, *rest = text.split("<s>")
        return [*first.encode(), *(token for part in rest for token in (self.bos_id, *part.encode()))]

    encode_first = encode


def test_a_begin_token_that_a_text_brings_is_said_and_not_doubled():
    renderer = Renderer(Begins())
    document = renderer(Example(id="x", prompt="<s>p", completion="c", where="a:1"))
    assert list(document.tokens) == [257, *b"pc", 256]
    (note,) = renderer.notes.list()
    assert (note.level, note.first) == ("warning", "a:1")
    assert note.text.startswith("the text brings its own begin token, '<bos>'")
