"""A dry run shows documents as they will be learned: tokens, mask and weights."""

import json
import re
import sys

import pytest
import tomli_w
from chat_tokenizers import CHATML, chat_tokenizer, prepare
from tiny_recipe import tiny_recipe

import wmtp
from wmtp.cli import main
from wmtp.cli.facts import print_documents
from wmtp.data.config import Jsonl
from wmtp.data.shown import ShownDocument, ShownToken, shown_documents
from wmtp.tokenizers.bytes import BytesTokenizer

TURNS = [{"role": "user", "content": "q\n\x1b[2J"}, {"role": "assistant", "content": "an answer", "weight": 0.5}]


def test_marks_stand_around_what_is_learned(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    (shown,) = shown_documents(prepare(tmp_path, tokenizer, [{"messages": TURNS}]), tokenizer)
    title, *lines = str(shown).splitlines()
    assert re.fullmatch(r"chat: a\.jsonl:1, \d+ tokens, \d+ of them learned", title)
    text = "\n".join(line.removeprefix("    ") for line in lines)
    assert re.sub("[│⟦⟧]", "", text) == (
        "<|im_start|>user\\n\nq\\n\n\\x1b[2J<|im_end|>\\n\n<|im_start|>assistant\\n\n×0.5 an answer<|im_end|>\\n"
    )
    (marked,) = re.findall("⟦(.*?)⟧", text)
    assert marked.replace("│", "") == "×0.5 an answer<|im_end|>"
    assert sum(token.learned for token in shown.tokens) == marked.count("│") < len(shown.tokens) == text.count("│")


def test_on_a_terminal_colour_stands_for_the_marks_and_the_document_commands_nothing(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)
    (shown,) = shown_documents(prepare(tmp_path, tokenizer, [{"messages": TURNS}]), tokenizer)
    text = shown.text(colour=True)
    assert set(re.findall("\x1b\\[?\\d*.?", text)) == {"\x1b[32m", "\x1b[2m", "\x1b[0m"}
    (green,) = re.findall("\x1b\\[32m(.*?)\x1b\\[0m", text)
    assert green.replace("│", "") == "×0.5 an answer<|im_end|>"
    plain = re.sub("\x1b\\[\\d+m", "", text)
    assert plain == re.sub("[⟦⟧]", "", str(shown))


def test_long_documents_are_shown_around_the_borders_of_what_is_learned(tmp_path):
    records = [
        {"prompt": "p" * 500, "completion": "c" * 500},
        {"prompt": "2 + 2 =", "completion": " 4", "weights": [2, 0.5]},
        {"prompt": "never", "completion": "shown"},
    ]
    dataset = Jsonl(uri="")
    tokenizer = BytesTokenizer()
    long, short = shown_documents(prepare(tmp_path, tokenizer, records, dataset=dataset, max_length=2000), tokenizer)
    line = str(long).splitlines()[1].replace("│", "")
    begin = re.escape(tokenizer.token(257))
    assert re.fullmatch(
        rf"    {begin}p{{15}} … 469 more … p{{16}}⟦c{{16}}⟧ … 469 more … ⟦c{{15}}{re.escape(tokenizer.token(256))}⟧", line
    )
    assert str(short).splitlines()[1].replace("│", "").endswith("2 + 2 =⟦w2  ⟧⟦w0.5 4⟧⟦" + tokenizer.token(256) + "⟧")


def test_the_first_token_of_a_text_is_not_learned(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", CHATML)  # without a begin token
    data = prepare(tmp_path, tokenizer, [{"text": "ab"}], dataset=Jsonl(uri=""))
    (shown,) = shown_documents(data, tokenizer)
    assert shown.tokens[0].learned is False
    assert sum(token.learned for token in shown.tokens) == data.learned_tokens


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) for n in range(5))
    )
    tables = {
        "datasets": {"sums": {"type": "jsonl", "uri": "sums.jsonl"}},
        "data": {"train": {"max_length": 32, "batch_size": 1}},
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tiny_recipe(**tables)))
    return "recipe.toml"


def test_the_command_shows_two_documents_and_json_has_their_tokens(recipe, capsys):
    assert main(["run", recipe, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "documents as they will be learned (learned: ⟦…⟧" in out
    assert "sums: sums.jsonl:1, 7 tokens, 2 of them learned\n    <bos>│0│+│1│=│⟦1│<eos>│⟧\n" in out
    assert "sums: sums.jsonl:2, 7 tokens, 2 of them learned" in out
    assert main(["run", recipe, "--dry-run", "--json"]) == 0
    first, _ = json.loads(capsys.readouterr().out)["documents"]
    assert [(token["text"], token["learned"]) for token in first["tokens"]][3:5] == [("1", False), ("=", False)]
    assert first["tokens"][5] == {"text": "1", "learned": True, "scale": 1.0, "weight": 1.0}


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_colour_is_for_terminals_that_want_it(variables, coloured, is_terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    for name, value in ({"TERM": "xterm", "NO_COLOR": ""} | variables).items():
        monkeypatch.setenv(name, value)
    print_documents([ShownDocument(source="x", id="1", tokens=(ShownToken("a", True),))])
    assert ("\x1b" in capsys.readouterr().out) is (coloured and is_terminal)


def test_python_gets_the_documents(recipe):
    facts = wmtp.run(recipe, dry_run=True)
    assert [document.id for document in facts["documents"]] == ["sums.jsonl:1", "sums.jsonl:2"]
