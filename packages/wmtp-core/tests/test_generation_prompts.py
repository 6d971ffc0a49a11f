"""A prompt gets its begin token once, also where the text brings it."""

import pytest
from chat_tokenizers import INST, chat_tokenizer

from wmtp.generation.text import encode_prompt


class Begins:
    """A tokenizer whose texts begin with token 0, written ``<s>``."""

    bos_id = 0

    def encode_first(self, text):
        return ([0] if text.startswith("<s>") else []) + [ord(letter) for letter in text.removeprefix("<s>")]


@pytest.mark.parametrize("text", ["hi", "<s>hi"])
def test_a_begin_token_that_the_text_brings_is_not_doubled(text):
    assert encode_prompt(Begins(), text) == [0, ord("h"), ord("i")]


def test_a_tokenizer_without_a_begin_token_adds_none(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, INST)
    assert encode_prompt(tokenizer, "<s>hi") == tokenizer.encode("<s>hi")
