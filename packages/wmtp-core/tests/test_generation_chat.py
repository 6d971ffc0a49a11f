"""``model.chat`` and ``wmtp generate --chat``: written by the model's template, ended by any of its ends."""

import io
import json
import sys

import pytest
import torch
from chat_tokenizers import CHATML, INST, MARKED, chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import wmtp
from wmtp.cli import main
from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.generation.text import chat_prompt, encode_prompt
from wmtp.models.ends import learn_turn_end
from wmtp.models.mtp import MTPModel
from wmtp.models.saving import make_savable
from wmtp.tokenizers.chat_template import turn_end_id

USER = {"role": "user", "content": "q"}


def parrot(folder, followers, template=CHATML, eos="</s>", ends=None):
    """A model in which each token is followed by one token, whatever comes before."""
    tokenizer = chat_tokenizer(folder, template, eos)
    size = 512
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=ends,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.generation_config.eos_token_id = ends
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        base.model.embed_tokens.weight.copy_(torch.eye(size)[: tokenizer.vocab_size])
        for before, after in followers.items():
            base.lm_head.weight[id_of(tokenizer, after), id_of(tokenizer, before)] = 1
    MTPModel(base.eval(), HeadsConfig(horizon=1), seed=0).save_pretrained(folder)
    return folder


def id_of(tokenizer, text):
    (found,) = tokenizer.encode(text)
    return found


CHAIN = {"\n": "a", "a": "b", "b": "<|im_end|>", "<|im_end|>": "c", "c": "</s>", "</s>": "d", "d": "d"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parrot(tmp_path_factory.mktemp("parrot"), CHAIN)


@pytest.fixture(scope="module")
def model(folder):
    return wmtp.load_model(folder)


def test_an_answer_is_asked_for_as_transformers_asks_and_ends_with_the_turn(model):
    tokenizer = model.tokenizer
    messages = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "x"}, USER]
    theirs = tokenizer._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert chat_prompt(tokenizer, messages) == theirs["input_ids"]
    answer = model.chat(messages)
    assert (str(answer), answer.finish, answer.tokens[-1]) == ("ab", "eos", id_of(tokenizer, "<|im_end|>"))
    # a plain text goes on to the end that tokenizer and generation config name
    assert str(model.generate("\n")) == "abc"
    assert [str(each) for each in model.chat([messages, [USER]])] == ["ab", "ab"]
    assert str(model.chat("q")) == "ab"


def test_an_end_token_that_is_asked_for_ends_texts_too(model):
    b = id_of(model.tokenizer, "b")
    assert model.generate("\n", eos_id=b).tokens[-1] == b
    assert model.generate("\n", eos_id=[b, 0]).tokens == model.generate([id_of(model.tokenizer, "\n")], eos_id=b).tokens


def test_stop_texts_are_refused_where_prompts_are_ids(model):
    with pytest.raises(ConfigError, match=r"stop: .*; give texts, or eos_id"):
        model.generate([id_of(model.tokenizer, "\n")], stop=["b"])


@pytest.mark.parametrize(("ends", "wanted"), [(None, "abc"), (["b", "d"], "ab")])
def test_each_end_of_a_list_ends_an_answer(tmp_path, ends, wanted):
    """Here the template writes no token behind an answer."""
    template = CHATML.replace("+ '<|im_end|>'", "")
    ids = None if ends is None else [id_of(chat_tokenizer(tmp_path / "t", template, "</s>"), end) for end in ends]
    model = wmtp.load_model(parrot(tmp_path / "m", CHAIN, template, ends=ids))
    assert turn_end_id(model.tokenizer) is None
    assert str(model.chat("q")) == wanted


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [
        (CHATML, "</s>", "<|im_end|>"),
        (MARKED, "</s>", "<|im_end|>"),
        (INST, "</s>", "</s>"),
        ("{{ nothing.at.all }}", "</s>", None),
    ],
)
def test_the_token_that_ends_a_turn_is_the_templates(tmp_path, template, eos, end):
    tokenizer = chat_tokenizer(tmp_path, template, eos)
    assert turn_end_id(tokenizer) == (None if end is None else id_of(tokenizer, end))


def test_a_model_that_learns_conversations_is_saved_with_the_end_of_a_turn(folder, model, tmp_path):
    tokenizer = model.tokenizer
    make_savable(model.base, tokenizer=tokenizer, source=folder, untouched=None, scratch=tmp_path)
    ends = [id_of(tokenizer, token) for token in ("</s>", "<|im_end|>")]
    assert model.base.generation_config.eos_token_id == ends[0]
    for _ in range(2):
        learn_turn_end(model.base, tokenizer, "models.base")
        assert model.base.generation_config.eos_token_id == ends
    model.base.generation_config.eos_token_id = None


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([USER, {"role": "assistant", "content": "a"}], "chat: the last message is an assistant's"),
        ([], 'chat: "messages" holds no message'),
        ([{"role": "critic", "content": "a"}], "\"role\" is 'critic'"),
    ],
)
def test_messages_that_cannot_be_answered(model, messages, problem):
    with pytest.raises(wmtp.ConfigError) as caught:
        model.chat(messages)
    assert problem in str(caught.value)


def test_a_prompt_begins_with_the_space_that_training_begins_with():
    class Metaspace:
        bos_id = None

        def encode(self, text):
            return [ord(letter) for letter in text]

        def encode_first(self, text):
            return self.encode(f" {text}")

    assert encode_prompt(Metaspace(), "hi") == [*b" hi"]


def run(capsys, *words):
    code = main(["generate", *map(str, words), "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def test_one_message_on_the_command_line(folder, capsys):
    assert run(capsys, folder, "--chat", "--prompt", "q", "--system", "s")[:2] == (0, "ab\n")
    code, out, _ = run(capsys, folder, "--chat", "--prompt", "q", "--json")
    assert (code, json.loads(out)["text"]) == (0, "ab")
    assert wmtp.generate(folder, [USER], chat=True, device="cpu").text == "ab"


def test_a_conversation_line_by_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n\nand?\n"))
    assert run(capsys, folder, "--chat")[:2] == (0, "ab\nab\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\nand?\n"))
    code, out, _ = run(capsys, folder, "--chat", "--system", "s", "--json")
    assert [(each["role"], each["content"]) for each in json.loads(out)["messages"]] == [
        *(("system", "s"), ("user", "q"), ("assistant", "ab"), ("user", "and?"), ("assistant", "ab")),
    ]


def test_a_plain_prompt_to_a_model_with_a_template_is_said(folder, capsys):
    said = "the model has a chat template, which a plain text does not use: --chat answers by it"
    assert said in run(capsys, folder, "--prompt", "\n")[2]
    assert said not in run(capsys, folder, "--prompt", "<|im_start|>user\n")[2]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--system", "s", "--prompt", "q"], "--system: has no effect without --chat"),
        ([], "give either --prompt TEXT or --prompt-file FILE, or --chat alone to talk"),
    ],
)
def test_arguments_that_do_nothing_are_refused(folder, capsys, words, problem):
    code, _, err = run(capsys, folder, *words)
    assert code == 2
    assert problem in err


def test_without_a_template_there_is_no_chat(tmp_path, capsys):
    parrot(tmp_path, CHAIN, template=None)
    code, _, err = run(capsys, tmp_path, "--chat", "--prompt", "q")
    assert code == 2
    assert "no chat template; continue a plain text instead, or put the template beside the model as chat_template.jinja" in err
