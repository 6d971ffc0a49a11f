"""A saved model behaves as it was trained: plain transformers begins and ends a text with it as training did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crossings import sampled
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import wmtp

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]
SPECIAL = ["<s>", "</s>", "<|im_end|>", "<|eot|>"]
BEGIN, END, IM_END, EOT = range(4)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

PLAIN = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

*folders, prompt = sys.argv[1:]
found = []
for folder in folders:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": 20, "do_sample": False}
    piped = pipeline("text-generation", model=folder, **options)(prompt, return_full_text=False)
    configs = [AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)]
    found.append({
        "inputs": inputs["input_ids"][0].tolist(),
        "generated": model.generate(**inputs, **options)[0].tolist(),
        "piped": piped[0]["generated_text"],
        "ends": [config.eos_token_id for config in configs],
        "begins": [config.bos_token_id for config in configs],
        "tokenizer": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template],
    })
print(json.dumps(found))
assert "wmtp" not in sys.modules
"""


def write_base(folder: Path, ends: int | list[int] | None, begin: int | None = BEGIN) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.1, bos_token_id=9, eos_token_id=ends,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=9, eos_token_id=ends)
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="seven"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE,
        additional_special_tokens=SPECIAL[2:],
    ).save_pretrained(folder)  # fmt: skip


def train(folder: Path, **changes: Any) -> Path:
    """Learn by heart that ``one two`` goes on with ``three four`` and then ends."""
    data = folder / "data.jsonl"
    data.write_text(json.dumps({"prompt": "one two ", "completion": "three four"}) + "\n")
    config: dict[str, Any] = {
        "run": {"output_dir": str(folder / "runs"), "name": "run"},
        "models": {"base": {"type": "hf", "uri": str(folder / "base"), "heads": {"horizon": 2, "kind": "residual"}}},
        "datasets": {"code": {"type": "jsonl", "uri": str(data)}},
        "data": {"train": {"sources": ["code"], "max_length": 16, "batch_size": 4}},
        "trainer": {"type": "baseline-mtp"},
        "optimizer": {"type": "adamw", "lr": 1e-2},
        "schedule": {"warmup_steps": 0},
        "train": {"max_steps": 40},
        "devices": {"device": "cpu"},
        "tracker": {"type": "jsonl"},
    }
    run_dir = wmtp.run({**config, **changes}).run_dir
    assert run_dir is not None
    return run_dir


def in_transformers(*folders: Path) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", PLAIN, *folders, "one two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("ends", "saved"),
    sampled(
        [
            ([END, EOT], [IM_END, END, EOT]),  # a chat model with several ends, and now one more
            (END, IM_END),  # the base ends elsewhere
            ([EOT, IM_END], [EOT, IM_END]),  # one of them is what is trained
            (None, IM_END),
        ],
        4,
    ),
)
def test_transformers_stops_where_training_stopped(tmp_path: Path, ends: int | list[int] | None, saved: int | list[int]):
    write_base(tmp_path / "base", ends)
    chosen = {"type": "hf-transformers", "uri": str(tmp_path / "base"), "eos_token": "<|im_end|>"}
    run_dir = train(tmp_path, tokenizer=chosen)
    wmtp.export(run_dir, tmp_path / "exported", format="hf")
    for found in in_transformers(run_dir / "model", tmp_path / "exported"):
        assert found["inputs"] == [BEGIN, 4, 5]
        assert found["generated"] == [BEGIN, 4, 5, 6, 7, IM_END]
        assert found["piped"].split() == ["three", "four"]
        assert found["ends"] == [saved, saved]
        assert found["begins"] == [BEGIN, BEGIN]
        assert found["tokenizer"] == [BEGIN, IM_END, TEMPLATE]
    assert wmtp.load_model(tmp_path / "exported").generate("one two", max_new_tokens=20).tokens[-1] == IM_END


@pytest.mark.slow
def test_without_a_begin_token_in_training_the_configs_keep_theirs(tmp_path: Path):
    write_base(tmp_path / "base", END, begin=None)
    (found,) = in_transformers(train(tmp_path) / "model")
    assert found["inputs"] == [4, 5]
    assert found["generated"] == [4, 5, 6, 7, END]
    assert found["begins"] == [9, 9]


def test_wmtp_stops_at_every_end_of_a_list(tmp_path: Path):
    """The tokenizer names one of two ends, and the model writes the other one."""
    write_base(tmp_path / "base", [END, EOT])
    chosen = {"type": "hf-transformers", "uri": str(tmp_path / "base"), "eos_token": "<|eot|>"}
    run_dir = train(tmp_path, tokenizer=chosen)
    model = run_dir / "model"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            (model / name).write_text((model / name).read_text().replace('"eos_token": "<|eot|>"', '"eos_token": "</s>"'))
    loaded = wmtp.load_model(model)
    assert loaded.tokenizer.eos_id == END
    assert loaded.generate("one two", max_new_tokens=20).tokens[-3:] == (6, 7, EOT)
    assert wmtp.generate(str(model), "one two", max_new_tokens=20).tokens[-3:] == [6, 7, EOT]


#: an answer ends with another token than a text does
TURNS = "{{ bos_token }}{% for m in messages %}{{ ' ' + m['content'] + ' <|im_end|>' }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]


@pytest.mark.parametrize(("kind", "formats"), [("block", ("hf", "wmtp", "meta")), ("shared", ("mtp",))])
def test_conversations_are_asked_and_ended_as_trained_also_after_every_export(
    tmp_path: Path, kind: str, formats: tuple[str, ...]
):
    write_base(tmp_path / "base", END)
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    run_dir = train(
        tmp_path,
        models={"base": {"type": "hf", "uri": str(tmp_path / "base"), "heads": {"horizon": 2, "kind": kind}}},
        datasets={"code": {"type": "chat", "uri": str(data)}},
        data={"train": {"sources": ["code"], "max_length": 16, "batch_size": 4, "chat_template": TURNS}},
    )
    folders = [run_dir / "model"]
    for format in formats:
        wmtp.export(run_dir, tmp_path / format, format=format)
        folders.append(tmp_path / format)
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer" if folder.name == "mtp" else folder)
        inputs = tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt")
        asked = [BEGIN, 4, 5, IM_END]
        assert inputs["input_ids"][0].tolist() == asked
        assert tokenizer("one")["input_ids"] == [BEGIN, 4]
        if folder.name != "meta":  # transformers reads no weights of that layout
            plain: Any = AutoModelForCausalLM.from_pretrained(folder)
            assert plain.generation_config.eos_token_id == [END, IM_END]
            assert plain.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist() == [*asked, 6, 7, IM_END]
        answer = wmtp.load_model(folder).chat(MESSAGES[:1], max_new_tokens=20)
        assert (answer.tokens, answer.finish) == ((6, 7, IM_END), "eos")
