"""Tiny tokenizers with chat templates of every kind that matters; the templates are the tests' own."""

import json
from functools import cache
from pathlib import Path

import attrs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from wmtp.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainDataConfig
from wmtp.data.config import Chat
from wmtp.data.prepare import prepare_data, use_chat_template
from wmtp.plugins.contract import ModelLoaderConfig, TrainerConfig
from wmtp.tokenizers.hf import HfTokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|end|>"]

_TURN = "{{ '<|im_start|>' + m['role'] + '\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

#: ends every turn alike, marks nothing
CHATML = "{% for m in messages %}" + _TURN + "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}" + _PROMPT
#: marks what an assistant generates, its end included
MARKED = (
    "{% for m in messages %}" + _TURN + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}" + _PROMPT
)
#: marks the content alone, so that the end of a turn is not learned
MARKED_SHORT = (
    "{% for m in messages %}" + _TURN + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}" + _PROMPT
)
#: as Mistral's: a begin token of its own, an answer ends with the end of text, roles must alternate
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
#: as Phi's: an end of text behind the last turn
END_OF_TEXT = (
    "{% for m in messages %}{{ '[INST]' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[INST]assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
#: as a reasoning model's: writes a thought in the last turn alone
THINKING = (
    "{% for m in messages %}{% set content = m['content'].split('</think>')[-1] if not loop.last else m['content'] %}"
    + _TURN
    + "{{ content + '<|im_end|>' + '\n' }}{% endfor %}"
    + _PROMPT
)
#: writes tools and tool calls
TOOLS = (
    "{% for tool in tools or [] %}{{ 'tool ' + (tool | tojson) + '\n' }}{% endfor %}{% for m in messages %}"
    + _TURN
    + "{{ m['content'] }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}"
    "{% endfor %}{{ '<|im_end|>' + '\n' }}{% endfor %}" + _PROMPT
)
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "inst": INST, "end-of-text": END_OF_TEXT}


@cache
def _backend(special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(), "Answer: Hello\n\n Hi assistant\nuser\n" * 20], trainer)
    return tokenizer.to_str()


def chat_tokenizer(folder, template, eos="<|im_end|>", bos=None, special=SPECIAL):
    """A tokenizer of transformers, saved and opened by WMTP."""
    names = {} if bos is None else {"bos_token": bos}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(tuple(dict.fromkeys(special)))), eos_token=eos, **names
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    return HfTokenizer(Path(folder))


def learned_texts(tokenizer, document):
    """The runs of tokens to learn of a tokenized example, decoded with their special tokens."""
    from wmtp.data.tokenized import LEARNED

    texts, place = [], 0
    for segment in document.segments:
        if segment.kind == LEARNED:
            texts.append(
                tokenizer._backend.decode(list(document.tokens[place : place + segment.length]), skip_special_tokens=False)
            )
        place += segment.length
    return texts


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@attrs.frozen(kw_only=True)
class Unused(TrainerConfig):
    type = "unused"


@attrs.frozen(kw_only=True)
class UnusedModel(ModelLoaderConfig):
    type = "unused"


def prepare(tmp_path, tokenizer, records, *, dataset=None, **train):
    """The records as data to train on, read by `chat` unless ``dataset`` says otherwise."""
    path = write(tmp_path / "a.jsonl", records)
    config = Config(
        models={"base": ModelConfig(loader=UnusedModel())},
        trainer=Unused(),
        datasets={"chat": dataset or Chat(uri=str(path))},
        run=RunConfig(output_dir=str(tmp_path / "runs")),
        data=DataConfig(train=TrainDataConfig(**{"max_length": 64} | train)),
    )
    use_chat_template(tokenizer, config.data.train)
    return prepare_data(config, tokenizer, {"chat": path}).train
