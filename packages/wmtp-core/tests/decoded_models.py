"""Tiny models with heads that are right now and then, and their plain greedy loop."""

from __future__ import annotations

from functools import partial

import torch
from tiny_config import tiny_config
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from wmtp.config.schema import HeadsConfig
from wmtp.models.mtp import MTPModel

__all__ = [
    "ARCHITECTURES",
    "EOS",
    "KINDS",
    "PAIRS",
    "PROMPTS",
    "SMALL",
    "STATEFUL",
    "WINDOWS",
    "decoding_model",
    "gpt2_base",
    "llama_base",
    "plain_greedy",
    "qwen3_base",
    "tiny_base",
]


KINDS = ("block", "linear", "residual", "chained", "shared")


PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3], [20, 21], [30, 31] * 8]


EOS = 3


SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def llama_base(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes))


def gpt2_base(**changes: object) -> PreTrainedModel:
    options = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**options | changes, bos_token_id=None, eos_token_id=None))


def qwen3_base(**changes: object) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL | {"head_dim": 8} | changes))


def tiny_base(model_type: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(tiny_config(model_type))


ARCHITECTURES = {"llama": llama_base, "gpt2": gpt2_base, "qwen3": qwen3_base}


# layers with a state: the last one attends in one, and keeps a state in the other, so that heads do
STATEFUL = {"qwen3_next": partial(tiny_base, "qwen3_next"), "mamba2": partial(tiny_base, "mamba2")}


WINDOWS = {"gpt_oss": partial(tiny_base, "gpt_oss"), "mistral": partial(tiny_base, "mistral")}


PAIRS = {"bamba": partial(tiny_base, "bamba")}  # its layers return two things


def decoding_model(architecture: str = "llama", kind: str = "block", horizon: int = 4, **changes: object) -> MTPModel:
    torch.manual_seed(0)
    base = (ARCHITECTURES | STATEFUL | WINDOWS | PAIRS)[architecture](**changes).eval()
    model = MTPModel(base, HeadsConfig(horizon=horizon, kind=kind, init="copy"), seed=1).eval()  # type: ignore[arg-type]
    with torch.no_grad():  # heads that are nearly head 1's own: some drafts are right in a text that repeats itself
        for parameter in model.extra_heads.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model


@torch.no_grad()
def plain_greedy(model: MTPModel, prompt: list[int], count: int, eos: int | None = EOS) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(model.base(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]
