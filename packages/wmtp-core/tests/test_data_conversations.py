"""A conversation teaches exactly what assistants say and the token that ends it, or an error says why not."""

import json

import pytest
from chat_tokenizers import CHATML, MARKED_SHORT, TEMPLATES, THINKING, TOOLS, chat_tokenizer, learned_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared import prepare_file, write_lines

from wmtp.data.base import BadExample, Example, Span
from wmtp.data.config import Chat, Jsonl
from wmtp.data.render import Renderer
from wmtp.data.tokenized import CONTEXT, LEARNED, NEVER
from wmtp.errors import ConfigError
from wmtp.tokenizers.bytes import BytesTokenizer

ENDS = {"chatml": "<|im_end|>", "marked": "<|im_end|>", "inst": "</s>", "end-of-text": "<|end|>"}
EOS = {"chatml": "<|im_end|>", "marked": "<|im_end|>", "inst": "</s>", "end-of-text": "</s>"}
BOS = {"inst": "<s>"}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def example(*messages, **more):
    return Example(id="x", messages=tuple(messages), where="a.jsonl:1", **more)


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        name: chat_tokenizer(tmp_path_factory.mktemp(name), template, EOS[name], BOS.get(name))
        for name, template in TEMPLATES.items()
    }


# no surrogates, and nothing that reads as a special token
said = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r<[|"), min_size=1, max_size=40).filter(
    lambda text: bool(text.strip())
)


@st.composite
def conversations(draw):
    messages = [message("system", draw(said))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [message("user", draw(said)), message("assistant", draw(said))]
    return messages


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(messages=conversations(), boundary=st.sampled_from(["apart", "together"]))
def test_learned_is_what_assistants_say_and_the_end_of_their_turn(tokenizers, kind, messages, boundary):
    tokenizer = tokenizers[kind]
    renderer = Renderer(tokenizer, boundary=boundary)
    document = renderer(example(*messages))
    wanted = [m["content"] + ENDS[kind] for m in messages if m["role"] == "assistant"]
    text = tokenizer._backend.decode(list(document.tokens), skip_special_tokens=False)
    assert text == tokenizer._tokenizer.apply_chat_template(messages, tokenize=False)
    merged = bool(renderer.notes.list())
    if boundary == "apart" or not merged:
        assert learned_texts(tokenizer, document) == wanted
    else:  # a token that begins in the prompt is learned whole
        assert all(found.endswith(text) for found, text in zip(learned_texts(tokenizer, document), wanted, strict=True))
    if boundary == "together" or not merged:
        assert list(document.tokens) == tokenizer._tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(messages=conversations())
def test_the_mask_is_that_of_transformers_where_a_template_marks(tokenizers, messages):
    tokenizer = tokenizers["marked"]
    document = Renderer(tokenizer, boundary="together")(example(*messages))
    theirs = tokenizer._tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert list(document.tokens) == theirs["input_ids"]
    mask = [segment.kind == LEARNED for segment in document.segments for _ in range(segment.length)]
    assert mask == [bool(flag) for flag in theirs["assistant_masks"]]


@given(messages=conversations())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_last_learns_the_last_answer_and_all_learns_everything(tokenizers, kind, messages):
    tokenizer = tokenizers[kind]
    last = Renderer(tokenizer, learn="last")(example(*messages))
    assert learned_texts(tokenizer, last) == [messages[-1]["content"] + ENDS[kind]]
    assert {segment.kind for segment in Renderer(tokenizer, learn="all")(example(*messages)).segments} <= {
        CONTEXT,
        LEARNED,
        NEVER,
    }


def test_a_begin_token_of_the_template_is_the_only_one(tokenizers):
    tokenizer = tokenizers["inst"]
    document = Renderer(tokenizer)(example(message("user", "a"), message("assistant", "b")))
    assert [tokenizer.token(token) for token in document.tokens].count("<s>") == 1


def test_weights_and_train_of_messages(tokenizers, kind):
    messages = [
        *(message("user", "q1"), message("assistant", "one", weight=0.5), message("user", "q2")),
        *(message("assistant", "two", train=False), message("user", "q3"), message("assistant", "three", weight=0)),
        *(message("user", "q4"), message("assistant", "four")),
    ]
    for learn in ("assistant", "all"):
        document = Renderer(tokenizers[kind], learn=learn)(example(*messages))
        assert learned_texts(tokenizers[kind], document) == ["one" + ENDS[kind], "four" + ENDS[kind]]
        assert [segment.scale for segment in document.segments if segment.kind == LEARNED] == [0.5, 1.0]
        never = sum(segment.length for segment in document.segments if segment.kind == NEVER)
        assert never >= 2


def test_messages_before_the_first_learned_are_context(tokenizers, kind):
    messages = [message("user", "q1"), message("assistant", "one"), message("user", "q2"), message("assistant", "two")]
    document = Renderer(tokenizers[kind])(example(*messages, first_learned=3))
    assert learned_texts(tokenizers[kind], document) == ["two" + ENDS[kind]]


def test_a_template_that_rewrites_earlier_turns_is_told_with_the_choices(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, THINKING)
    answer = message("assistant", "<think>hm</think>yes")
    turns = [message("user", "a"), answer, message("user", "b"), answer]
    with pytest.raises(ConfigError) as caught:
        Renderer(tokenizer)(example(*turns))
    for part in ("data.train.learn: a.jsonl:1", "message 2 (assistant)", "<think>hm", "'last'", "documents = 'turn'"):
        assert part in str(caught.value)
    assert learned_texts(tokenizer, Renderer(tokenizer, learn="last")(example(*turns))) == ["<think>hm</think>yes<|im_end|>"]
    everything = Renderer(tokenizer, learn="all")(example(*turns))
    assert sum(segment.length for segment in everything.segments if segment.kind == LEARNED) == len(everything.tokens)
    # an earlier turn that is not to be learned may be rewritten
    assert len(learned_texts(tokenizer, Renderer(tokenizer)(example(turns[0], {**answer, "train": False}, *turns[2:])))) == 1


def test_a_thought_that_the_template_leaves_out_of_what_is_learned_is_told(tmp_path):
    strips = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    turns = [message("user", "a"), message("assistant", "<think>hm</think>yes")]
    with pytest.raises(BadExample, match=r"message 2 \(assistant\): the chat template does not write its thought \('hm'\)"):
        Renderer(chat_tokenizer(tmp_path, strips))(example(*turns))


def test_an_end_of_turn_outside_the_marks_is_said_once(tmp_path):
    renderer = Renderer(chat_tokenizer(tmp_path, MARKED_SHORT))
    for number in range(3):
        messages = (message("user", "a"), message("assistant", "b"))
        renderer(Example(id=str(number), messages=messages, where=f"a.jsonl:{number + 1}"))
    (note,) = renderer.notes.list()
    assert note.of(4).startswith("3 of 4 documents (the first at a.jsonl:1): the token that ends an answer ('<|im_end|>')")
    assert "may not learn to stop" in note.text


ENDLESS = CHATML.replace("<|im_end|>", "")


@pytest.mark.parametrize("learn", ["assistant", "last", "all"])
@pytest.mark.parametrize("own", ["hf", "bytes"])
def test_a_template_that_ends_no_answer_is_said(learn, own, tmp_path):
    tokenizer = chat_tokenizer(tmp_path, ENDLESS) if own == "hf" else BytesTokenizer()
    tokenizer.chat_template = ENDLESS
    renderer = Renderer(tokenizer, learn=learn)
    renderer(example(message("user", "a"), message("assistant", "b")))
    (note,) = renderer.notes.list()
    assert "the chat template writes no special token behind an answer" in note.text
    assert note.level == "warning"
    assert ("write {{ eos_token }} behind answers in data.train.chat_template" in note.text) == (own == "hf")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}


def test_tool_calls_keep_their_arguments(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, TOOLS)
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    other = {"type": "function", "function": {"name": "mul", "arguments": {"x": [2]}}}
    turns = [
        *(message("user", "1+?"), message("assistant", "", tool_calls=[CALL]), message("tool", "1")),
        *(message("assistant", "", tool_calls=[other]), message("tool", "2"), message("assistant", "2")),
    ]
    document = Renderer(tokenizer)(example(*turns, tools=tools))
    assert learned_texts(tokenizer, document) == [
        '<call>add{"a": 1, "b": null}<|im_end|>',
        '<call>mul{"x": [2]}<|im_end|>',
        "2<|im_end|>",
    ]


def test_arguments_as_text_for_a_template_that_adds_texts(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, TOOLS.replace("(call.function.arguments | tojson)", "call.function.arguments"))
    document = Renderer(tokenizer)(example(message("user", "1+?"), message("assistant", "", tool_calls=[CALL])))
    assert learned_texts(tokenizer, document) == ['<call>add{"a": 1, "b": null}<|im_end|>']


def test_a_template_that_ignores_tools_is_told(tmp_path):
    renderer = Renderer(chat_tokenizer(tmp_path, CHATML))
    turns = [message("user", "1+?"), message("assistant", "x", tool_calls=[CALL])]
    with pytest.raises(BadExample, match="does not write its tool calls"):
        renderer(example(*turns))
    renderer(example(turns[0], message("assistant", "x"), tools=({"name": "add"},)))
    assert "does not write the tools" in renderer.notes.list()[0].text


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([message("user", "a")], "has no message of an assistant, so nothing to learn; its roles are user"),
        ([message("user", "a"), message("critic", "b")], "message 2: unknown role 'critic'"),
        ([message("user", "a"), message("assistant", " ")], "message 2 (assistant): is empty"),
        ([message("user", ""), message("assistant", "b")], "message 1 (user): is empty"),
        ([message("user", "a", weight=1), message("assistant", "b")], "message 1 (user): only an assistant's message"),
        ([message("user", "a"), message("assistant", "b", weight=-1)], "message 2: has a weight of -1"),
        ([message("user", ["a"]), message("assistant", "b")], "message 1: its content must be a text, not a list"),
    ],
)
def test_a_conversation_that_cannot_be_learned_says_why(tokenizers, messages, problem):
    with pytest.raises(BadExample) as caught:
        Renderer(tokenizers["chatml"])(example(*messages))
    assert str(caught.value).startswith("a.jsonl:1: ")
    assert problem in str(caught.value)


def test_a_template_that_fails_is_told_with_its_reason(tmp_path):
    for template, reason in (
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
    ):
        with pytest.raises(BadExample, match=r"a\.jsonl:1: the chat template refuses it") as caught:
            Renderer(chat_tokenizer(tmp_path, template))(example(message("user", "a"), message("assistant", "b")))
        assert reason in str(caught.value)


def test_a_template_that_leaves_a_message_out_is_told(tmp_path):
    silent = "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + m['content'] }}<|im_end|>{% endfor %}"
    turns = [message("system", "be good"), message("user", "a"), message("assistant", "b")]
    with pytest.raises(BadExample, match=r"message 1 \(system\): the chat template does not write its content"):
        Renderer(chat_tokenizer(tmp_path, silent))(example(*turns))


def test_without_a_template_there_is_an_error():
    with pytest.raises(BadExample, match="no chat template"):
        Renderer(BytesTokenizer())(example(message("user", "a"), message("assistant", "b")))


# spans


def test_spans_are_learned_as_they_say():
    spans = (Span("ab", learn=False), Span("cd", weight=0.5), Span("ef", weight=0), Span("gh", token_weights=2.0))
    document = Renderer(BytesTokenizer())(Example(id="x", spans=spans))
    assert list(document.tokens) == [257, *b"abcdefgh", 256]
    assert [(segment.length, segment.kind, segment.scale) for segment in document.segments] == [
        *((1, NEVER, 1.0), (2, CONTEXT, 1.0), (2, LEARNED, 0.5), (2, NEVER, 1.0), (3, LEARNED, 1.0)),
    ]
    assert document.weights == [1.0] * 7 + [2.0, 2.0, 1.0]
    assert document.prompt_length == 7


def test_weights_of_0_teach_nothing_and_the_end_neither():
    for weights in ((0.0, 0.0), (("ab", 0.0),)):
        document = Renderer(BytesTokenizer())(Example(id="x", prompt="p", completion="ab", weights=weights))
        assert document.weights == [1.0, 1.0, 0.0, 0.0, 0.0]
    document = Renderer(BytesTokenizer())(Example(id="x", prompt="p", completion="ab", weights=(0.0, 0.0, 3.0)))
    assert document.weights == [1.0, 1.0, 0.0, 0.0, 3.0]


def test_special_tokens_in_a_text_are_not_doubled(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    eos = tokenizer.eos_id
    for text in ("<|im_start|>user\na<|im_end|>", "<|im_start|>user\na<|im_end|>\n", "a"):
        renderer = Renderer(tokenizer)
        tokens = list(renderer(Example(id="x", completion=text)).tokens)
        assert tokens.count(eos) == 1
        assert bool(renderer.notes.list()) == (text != "a")


def test_a_cut_answer_ends_in_no_learned_token(tokenizers, kind, tmp_path):
    """The last answer of a record with `finish = "length"`, and no other."""
    talk = [message("user", "hi"), message("assistant", "yo"), message("user", "go on"), message("assistant", "and th")]
    file = tmp_path / "a.jsonl"
    for finish, end in (("eos", ENDS[kind]), ("length", ""), ("context", "")):
        file.write_text(json.dumps({"messages": talk, "finish": finish}) + "\n", encoding="utf-8")
        for documents in ("conversation", "turn"):
            found = [Renderer(tokenizers[kind])(each) for each in Chat(uri="", documents=documents).build().examples(file)]
            texts = [text for document in found for text in learned_texts(tokenizers[kind], document)]
            assert texts == ["yo" + ENDS[kind], "and th" + end]


def test_a_cut_completion_has_no_end_token(tmp_path):
    tokenizer, file = BytesTokenizer(), tmp_path / "a.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": "a", "completion": "bc", "finish": finish}) + "\n" for finish in ("eos", "length")),
        encoding="utf-8",
    )
    whole, cut = (Renderer(tokenizer)(each) for each in Jsonl(uri="").build().examples(file))
    assert list(whole.tokens) == [*cut.tokens, tokenizer.eos_id]
    assert [segment.length for segment in cut.segments] == [1, 1, 2]


def test_a_completion_that_was_cut_before_its_first_token_is_left_out(tmp_path):
    class WithoutBegin(BytesTokenizer):
        bos_id = None

    empty = {"prompt": "", "completion": "", "finish": "length"}
    file = write_lines(tmp_path / "a.jsonl", [empty, {"prompt": "a", "completion": "bc"}, empty])
    for number, tokenizer in enumerate((BytesTokenizer(), WithoutBegin())):
        for overlong in ("truncate", "split"):
            dataset = prepare_file(tmp_path / str(number), file, tokenizer, overlong=overlong).train
            assert [dataset.document(piece).document.index for piece in range(len(dataset))] == [1]
