"""Tokens, labels and remarks of every kind of record stay what they were, to the byte, however they are made."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wmtp.data import ahead, render
from wmtp.data.cache import token_store
from wmtp.data.config import Chat, Jsonl
from wmtp.tokenizers.hf import HfTokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "r e", "re t", "i n", "e r", "a n", "d e", "de f", "Ġ a", "Ġ def", ": Ċ", "Ċ ĠĠ", "s :", "n s", "w er", "Ġ x"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
)
WORDS = [
    "n",
    "s",
    "def f(x):\n",
    "  return x",
    "answer",
    "Answers:",
    " a",
    "an",
    "\n",
    "é",
    "日本",
    "👩‍🔬",
    "</s>",
    " ",
    "in",
    "x" * 40,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer written by hand, so that its ids do not depend on the release of a trainer."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES]))
    backend.add_special_tokens(SPECIAL)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    folder = tmp_path_factory.mktemp("tokenizer")
    names = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATE}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(str(folder))
    return HfTokenizer(folder)


def corpus(kind):
    """Records of all forms, good and bad, in an order that mixes them."""
    draw = random.Random(kind)

    def text():
        return "".join(draw.choices(WORDS, k=draw.randrange(12)))

    for number in range(150):
        form = draw.randrange(9)
        if kind == "chat":
            turns = [
                {"role": "user", "content": text()},
                {"role": "assistant", "content": text(), "weight": draw.choice([1, 0, 2])},
            ]
            yield {"messages": turns * draw.randrange(1, 3)} if form else {"messages": [{"role": "nobody"}]}
        elif form < 3:
            yield {"text": text() + "é", "id": number, "group": number // 3}
        elif form < 6:
            yield {
                "prompt": text() + draw.choice(["", " a"]),
                "completion": draw.choice(["", "n"]) + text() + ".",
                "reward": number / 8,
                "is_correct": number > 70,
            }
        elif form == 6:
            parts = [[text(), draw.choice([0, 0.5, 1])] for _ in range(3)]
            yield {"prompt": text(), "completion": "".join(part for part, _ in parts), "weights": parts}
        elif form == 7:
            yield {"prompt": "q", "completion": "ab", "weights": [0.25, 1] if number % 2 else [1, 0, 0.5]}
        else:
            yield draw.choice(
                [{"text": 3}, {"prompt": "a"}, {"text": "\ud800"}, {"text": ""}, {"text": "a", "other": "not read"}]
            )


@pytest.mark.parametrize("documents", [7, 1 << 14])
@pytest.mark.parametrize(
    ("kind", "boundary", "expected"),
    [
        ("records", "apart", ("38b6e28cf685007c", 143, 7814, 7)),
        ("records", "together", ("51e70d3981874c0a", 143, 7814, 7)),
        ("chat", "apart", ("63a711bacf7d03ed", 110, 14813, 40)),
    ],
)
def test_stores_are_the_same_to_the_byte(tmp_path, tokenizer, monkeypatch, kind, boundary, expected, documents):
    monkeypatch.setattr(ahead, "_DOCUMENTS", documents)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in corpus(kind)))
    config = Chat(uri="") if kind == "chat" else Jsonl(uri="")
    info = token_store(
        "d", config, path, tokenizer, cache_dir=tmp_path / "cache", on_bad_example="skip", boundary=boundary
    ).info
    assert (info.digest[:16], info.documents, info.tokens, info.bad) == expected
    merges = [(note.count, note.first.rpartition("/")[2]) for note in info.notes if "reaches from" in note.text]
    assert merges == ([(1, "a.jsonl:92")] if kind == "chat" else [(22, "a.jsonl:7")])


def test_borders_are_looked_at_in_the_first_documents(tmp_path, tokenizer, monkeypatch):
    """Each border is encoded twice to find tokens over it, which a large data set would pay for with a tenth of its time."""
    monkeypatch.setattr(render, "_LOOKED_AT", 3)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{number} a", "completion": "n"}) + "\n" for number in range(5)))
    stores = [
        token_store(
            "d", Jsonl(uri=""), path, tokenizer, cache_dir=tmp_path / boundary, on_bad_example="error", boundary=boundary
        )
        for boundary in ("apart", "together")
    ]
    apart, together = [next(note for note in store.info.notes if "reaches from" in note.text) for store in stores]
    assert apart.of(5).startswith(f"3 of the first 3 documents (the first at {path}:1): encoded as a whole")
    assert together.of(5).startswith("5 of 5 documents")
