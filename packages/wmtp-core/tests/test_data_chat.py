"""The loader `chat`: every form in which conversations are published, and what is wrong with a record."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from chat_tokenizers import CHATML, MARKED_SHORT, THINKING, Unused, UnusedModel, chat_tokenizer, prepare, write

from wmtp.config.rules import check
from wmtp.config.schema import Config, DataConfig, ModelConfig, TrainDataConfig
from wmtp.data.base import BadExample
from wmtp.data.config import Chat
from wmtp.errors import ConfigError, WMTPError
from wmtp.testing import DataLoaderTests
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.tokenizers.load import load_tokenizer

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def read(tmp_path, *records, **options):
    path = write(tmp_path / "a.jsonl", records)
    return list(Chat(uri="", **options).build().examples(path))


def roles(example):
    return [(message["role"], message["content"]) for message in example.messages]


class TestChat(DataLoaderTests):
    config = Chat(uri="data/x.jsonl", keys={"messages": "messages"}, documents="turn", answers="both")

    @pytest.fixture
    def path(self, tmp_path):
        return write(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, {"instruction": "q", "output": "a"}])

    @pytest.fixture
    def bad_path(self, tmp_path):
        return write(tmp_path / "bad.jsonl", [{"messages": [USER, ANSWER]}, {"messages": [USER]}, {"messages": [USER, ANSWER]}])


@pytest.mark.parametrize(
    ("record", "wanted", "first_learned"),
    [
        ({"messages": [USER, ANSWER]}, [("user", "q"), ("assistant", "a")], 0),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            [("system", "s"), ("user", "q"), ("assistant", "a")],
            0,
        ),
        ({"prompt": [USER], "completion": [ANSWER]}, [("user", "q"), ("assistant", "a")], 1),
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            [("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "a")],
            3,
        ),
        ({"prompt": "q", "completion": "a"}, [("user", "q"), ("assistant", "a")], 1),
        ({"instruction": "add", "input": "1 2", "output": "3"}, [("user", "add\n\n1 2"), ("assistant", "3")], 0),
        (
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["x", "y"]]},
            [("system", "s"), ("user", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "a")],
            0,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}, ANSWER]},
            [("user", "q\nr"), ("assistant", "a")],
            0,
        ),
        ({"messages": [USER, ANSWER], "prompt": "q", "source": "x"}, [("user", "q"), ("assistant", "a")], 0),
    ],
)
def test_the_form_of_a_record_is_recognized(tmp_path, record, wanted, first_learned):
    (example,) = read(tmp_path, record)
    assert roles(example) == wanted
    assert example.first_learned == first_learned
    assert (example.id, example.where) == ("a.jsonl:1", f"{tmp_path}/a.jsonl:1")


def test_tool_calls_are_brought_to_one_form(tmp_path):
    calls = [CALL, {"name": "mul", "arguments": {"b": None}}]
    records = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}], "tools": '[{"name": "add"}]'},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(calls[1])}]},
    ]
    first, second = read(tmp_path, *records)
    assert [call["function"] for call in first.messages[1]["tool_calls"]] == [
        {"name": "add", "arguments": {"a": 1}},
        {"name": "mul", "arguments": {"b": None}},
    ]
    assert first.tools == ({"name": "add"},)
    assert second.messages[1]["tool_calls"][0]["function"] == {"name": "mul", "arguments": {"b": None}}


def test_parquet_with_lists_of_structs(tmp_path):
    rows = [
        [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}],
        [USER, {**ANSWER, "tool_calls": [{"function": {"name": "g", "arguments": {"b": 2}}}]}],
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), path)
    calls = [example.messages[1]["tool_calls"][0]["function"] for example in Chat(uri="").build().examples(path)]
    # a struct has one set of keys for all rows; those that a row does not have are null in the file
    assert calls == [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}]


def test_an_answer_a_document(tmp_path):
    found = read(tmp_path, {"messages": [USER, ANSWER, USER, {**ANSWER, "content": "b"}], "group": "g"}, documents="turn")
    assert [(example.id, len(example.messages), example.first_learned, example.group) for example in found] == [
        ("a.jsonl:1 (answer 1)", 2, 1, "g"),
        ("a.jsonl:1 (answer 2)", 4, 3, "g"),
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [{**ANSWER, "content": "good"}], "rejected": [{**ANSWER, "content": "bad"}]},
        {"chosen": [USER, {**ANSWER, "content": "good"}], "rejected": [USER, {**ANSWER, "content": "bad"}]},
        {"prompt": [USER], "chosen": [USER, {**ANSWER, "content": "good"}], "rejected": [USER, {**ANSWER, "content": "bad"}]},
        {"prompt": "q", "chosen": [USER, {**ANSWER, "content": "good"}], "rejected": [USER, {**ANSWER, "content": "bad"}]},
    ],
)
def test_pairs_of_answers(tmp_path, record):
    right, wrong = read(tmp_path, record, answers="both")
    assert roles(right) == [("user", "q"), ("assistant", "good")]
    assert roles(wrong) == [("user", "q"), ("assistant", "bad")]
    assert (right.is_correct, wrong.is_correct) == (True, False)
    assert right.group == wrong.group
    assert right.id != wrong.id
    assert right.first_learned == 1
    (only,) = read(tmp_path, record, answers="chosen")
    assert only == right
    (said,) = read(tmp_path, record)
    assert isinstance(said, BadExample)
    assert "answers = 'chosen'" in said.problem
    assert "critic-wmtp" in said.problem


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": []}, '"messages" holds no message'),
        ({"messages": "hello"}, '"messages" must be a list of messages, not a string'),
        ({"messages": [USER]}, "has no message of an assistant, so nothing to learn"),
        ({"messages": ["hello"]}, "messages, message 1: must be an object, not a string"),
        ({"messages": [{"role": "narrator", "content": "x"}, ANSWER]}, "message 1: \"role\" is 'narrator'; known are system"),
        ({"messages": [{"content": "x"}, ANSWER]}, 'message 1: "role" is None'),
        ({"conversations": [{"from": "wizard", "value": "x"}]}, "message 1: \"from\" is 'wizard'"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2 (assistant): is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            "message 1 (user): has a part of type 'image_url' in its content; only text can be learned from",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": "{"}]}, "message 2: tool_calls: is a text, but not JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "message 2, tool call 1: has no name of a function"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, '"train" must be true or false, not a string'),
        ({"messages": [USER, {**ANSWER, "weight": "2"}]}, '"weight" must be a number, not a string'),
        ({"messages": [USER, ANSWER], "tools": 3}, '"tools" must be a list of objects, not a number'),
        ({"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b"}, 'format = "preference" or "prompt-completion"'),
        ({"question": "q", "answer": "a"}, "is no conversation of a known form"),
        (
            {"system": "s", "messages": [{"role": "system", "content": "t"}, USER, ANSWER]},
            'has both "system" and a first message',
        ),
        ({"instruction": "q", "output": "a", "input": 3}, '"input" must be a string, not a number'),
    ],
)
def test_a_bad_record_says_what_is_wrong(tmp_path, record, problem):
    good = {"messages": [USER, ANSWER]}
    _, bad, _ = read(tmp_path, good, record, good)
    assert isinstance(bad, BadExample)
    assert bad.where == f"{tmp_path}/a.jsonl:2"
    assert problem in str(bad)


def test_names_of_formats_and_keys(tmp_path):
    record = {"dialog": [USER, ANSWER], "chosen": "x", "rejected": "y"}
    (example,) = read(tmp_path, record, keys={"messages": "dialog"}, format="messages")
    assert roles(example) == [("user", "q"), ("assistant", "a")]
    (bad,) = read(tmp_path, {"text": "x"}, format="alpaca")
    assert 'needs "instruction" and "output" for format = "alpaca"; the keys here are text' in str(bad)


@pytest.mark.parametrize(
    ("record", "keys", "format", "columns"),
    [
        ({"prompt": "q", "completion": "a"}, {"completion": "prompt"}, "prompt-completion", "prompt and completion"),
        ({"instruction": "q", "output": "a"}, {"input": "instruction"}, "alpaca", "instruction and input"),
        ({"chosen": "a", "rejected": "b"}, {"rejected": "chosen"}, "preference", "chosen and rejected"),
        ({"messages": [USER, ANSWER]}, {"system": "messages"}, "messages", "messages and system"),
    ],
)
def test_two_texts_of_a_format_are_not_read_from_one_column(tmp_path, record, keys, format, columns):
    said = f"{columns} are read from one column"
    with pytest.raises(ValueError, match=said):
        Chat(uri="", keys=keys, format=format)
    # the records tell the format
    name = next(iter(keys))
    (bad, *_) = read(tmp_path, record | ({name: "x"} if name in record else {}), keys=keys, answers="chosen")
    assert f"a.jsonl:1: keys: {said}" in str(bad)


def test_a_system_message_may_be_read_from_what_other_formats_read(tmp_path):
    (example,) = read(tmp_path, {"messages": [USER, ANSWER], "prompt": "be brief"}, keys={"system": "prompt"})
    assert roles(example) == [("system", "be brief"), ("user", "q"), ("assistant", "a")]


# through the preparation


def learned(tokenizer, data):
    """Of each piece the runs of tokens that are learned, decoded."""
    found = []
    for number in range(len(data)):
        piece = data.document(number)
        runs = np.split(np.arange(len(piece.loss_mask)), np.flatnonzero(np.diff(piece.loss_mask)) + 1)
        tokens = [piece.tokens[run].tolist() for run in runs if piece.loss_mask[run[0]]]
        found.append([tokenizer._backend.decode(ids, skip_special_tokens=False) for ids in tokens])
    return found


TWO_TURNS = {"messages": [USER, ANSWER, USER, {**ANSWER, "content": "b"}]}


def test_learn_is_part_of_the_cache_and_so_is_the_template(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    answers = [["a<|im_end|>", "b<|im_end|>"]]
    assert learned(tokenizer, prepare(tmp_path, tokenizer, [TWO_TURNS])) == answers
    assert learned(tokenizer, prepare(tmp_path, tokenizer, [TWO_TURNS], learn="last")) == [["b<|im_end|>"]]
    (everything,) = learned(tokenizer, prepare(tmp_path, tokenizer, [TWO_TURNS], learn_prompt=True))
    assert len(everything) == 1
    assert everything[0].startswith("<|im_start|>user\nq<|im_end|>")
    assert learned(tokenizer, prepare(tmp_path, tokenizer, [TWO_TURNS])) == answers
    turns = Chat(uri="", documents="turn")
    assert learned(tokenizer, prepare(tmp_path, tokenizer, [TWO_TURNS], dataset=turns)) == [[text] for text in answers[0]]
    shouting = CHATML.replace("m['content']", "m['content'] + '!'")
    loud = prepare(tmp_path, tokenizer, [TWO_TURNS], chat_template=shouting)
    assert learned(tokenizer, loud) == [["a!<|im_end|>", "b!<|im_end|>"]]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == shouting


def test_prompt_and_response_weights(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    record = {"messages": [USER, {**ANSWER, "weight": 0.5}]}
    data = prepare(tmp_path, tokenizer, [record], prompt_weights={"chat": 0.25}, response_weights={"chat": 2.0})
    piece = data.document(0)
    assert piece.loss_mask.all()
    assert sorted(set(piece.scale.tolist())) == [0.25, 1.0]
    assert piece.scale[-2] == 0.5 * 2.0
    assert prepare(tmp_path, tokenizer, [{"messages": [USER, ANSWER]}]).document(0).scale is None


def test_a_conversation_whose_answers_are_cut_off_is_counted(tmp_path, caplog):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    long = {"messages": [{"role": "user", "content": "q " * 100}, ANSWER]}
    with caplog.at_level("INFO", "wmtp"):
        assert len(prepare(tmp_path, tokenizer, [long, TWO_TURNS])) == 1
    assert "1 left out because truncation cuts off all that would be learned" in caplog.text


def test_what_is_said_of_the_data_is_said_from_the_cache_too(tmp_path, caplog):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", MARKED_SHORT)
    for _ in range(2):
        caplog.clear()
        prepare(tmp_path, tokenizer, [TWO_TURNS, TWO_TURNS])
        (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert said.startswith(f"data.train: chat: 2 of 2 documents (the first at {tmp_path}/a.jsonl:1): the token that ends")


def test_conversations_without_a_template_are_told_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"datasets\.chat: .*no chat template; set data\.train\.chat_template"):
        prepare(tmp_path, BytesTokenizer(), [TWO_TURNS])
    tokenizer = BytesTokenizer()
    data = prepare(
        tmp_path,
        tokenizer,
        [TWO_TURNS],
        chat_template="{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ ';' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    piece = data.document(0)
    assert bytes(piece.tokens[piece.loss_mask].tolist()) == b"a;b;"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == tokenizer.chat_template


def test_a_rewriting_template_is_an_error_of_the_config(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", THINKING)
    records = [{"messages": [USER, {**ANSWER, "content": "<think>t</think>a"}, USER, ANSWER]}]
    with pytest.raises(ConfigError, match=r"set data\.train\.learn = 'last'"):
        prepare(tmp_path, tokenizer, records, on_bad_example="skip")
    turns = prepare(tmp_path, tokenizer, records, dataset=Chat(uri="", documents="turn"))
    assert learned(tokenizer, turns) == [["<think>t</think>a<|im_end|>"], ["a<|im_end|>"]]


def test_bad_conversations_are_left_out_where_the_config_says_so(tmp_path, caplog):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    records = [TWO_TURNS, {"messages": [USER]}, TWO_TURNS]
    with pytest.raises(WMTPError, match=r"a\.jsonl:2: has no message of an assistant"):
        prepare(tmp_path, tokenizer, records)
    with caplog.at_level("INFO", "wmtp"):
        assert len(prepare(tmp_path, tokenizer, records, on_bad_example="skip")) == 2
    assert "1 bad and left out" in caplog.text


def check_lines(**train):
    config = Config(
        models={"base": ModelConfig(loader=UnusedModel())},
        trainer=Unused(),
        datasets={"chat": Chat(uri="")},
        data=DataConfig(train=TrainDataConfig(**train)),
    )
    with pytest.raises(ConfigError) as caught:
        check(config)
    return caught.value.problems


def test_the_config_is_checked_before_anything_is_read(tmp_path):
    (tmp_path / "plain.txt").write_text("no braces")
    for train, problem in (
        (
            {"learn": "last", "learn_prompt": True},
            'data.train.learn_prompt: is true beside learn = "last"; remove learn_prompt',
        ),
        (
            {"prompt_weights": {"chta": 0.5}},
            "data.train.prompt_weights.chta: there is no [datasets.chta]; did you mean 'chat'?",
        ),
        ({"chat_template": str(tmp_path / "no.jinja")}, "cannot be read (No such file or directory)"),
        ({"chat_template": str(tmp_path / "plain.txt")}, "holds no Jinja template"),
    ):
        assert any(problem in line for line in check_lines(**train)), check_lines(**train)
    with pytest.raises(ValueError, match="prompt_weights: chat = 0"):
        TrainDataConfig(prompt_weights={"chat": 0.0})
