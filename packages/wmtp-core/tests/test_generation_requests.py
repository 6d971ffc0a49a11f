"""Requests to a decoder: their ends, streams, threads, and those that are refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoded_models import EOS, PROMPTS, decoding_model, llama_base, tiny_base

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.generation import Sampling, generate, stream
from wmtp.models.mtp import MTPModel


def test_streamed_tokens_are_the_generated_ones() -> None:
    model = decoding_model("gpt2", "residual")
    whole = generate(model, [PROMPTS[0]], max_new_tokens=30, eos_id=EOS)[0]
    pieces = list(stream(model, PROMPTS[0], max_new_tokens=30, eos_id=EOS, speculative=True))
    assert [token for piece in pieces for token in piece] == list(whole.tokens)
    assert len(pieces) <= len(whole.tokens)


def test_threads_take_turns_at_one_model() -> None:
    """Hooks of one thread's step would see the calls of another's."""
    model = decoding_model("gpt2", "block").train()
    settings = {"max_new_tokens": 12, "eos_id": None, "speculative": True}
    alone = [generate(model, [prompt], **settings) for prompt in PROMPTS[:4]]
    streamed = stream(model, PROMPTS[0], **settings)
    first = next(streamed)
    assert torch.is_grad_enabled(), "its caller's code is not the model's"
    model.train()  # as such code may do
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            assert list(threads.map(lambda prompt: generate(model, [prompt], **settings), PROMPTS[:4])) == alone
        assert not model.base.training, "the stream goes on"
        rest = threads.submit(list, streamed).result()
    assert [token for piece in [first, *rest] for token in piece] == list(alone[0][0].tokens)
    assert model.training
    assert model.base.training


def test_the_context_ends_a_text_and_a_stop_does() -> None:
    for architecture in ("llama", "gpt2"):
        model = decoding_model(architecture, "block")
        for speculative in (False, True):
            row = generate(model, [[7] * 55], max_new_tokens=40, eos_id=None, speculative=speculative)[0]
            assert (len(row.tokens), row.finish) == (9, "context")
            stopped = generate(
                model, [[7] * 5], max_new_tokens=40, eos_id=None, speculative=speculative, stop=lambda tokens: len(tokens) >= 6
            )[0]
            assert (len(stopped.tokens), stopped.finish) == (6, "stop")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 64], {}, "has 64 tokens, and the model's context is 64"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 97]], {}, "outside the model's vocabulary of 97"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([], {}, "no prompt"),
    ],
)
def test_bad_requests(prompts: list[list[int]], options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(decoding_model(), prompts, **{"max_new_tokens": 4, "eos_id": None, **options})  # type: ignore[arg-type]


def test_speculation_needs_extra_heads() -> None:
    model = decoding_model(horizon=1)
    with pytest.raises(ConfigError, match="no extra heads"):
        generate(model, [[1]], max_new_tokens=4, eos_id=None, speculative=True)
    assert generate(model, [[1]], max_new_tokens=4, eos_id=None)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("doge", "gives another result when it reads a text in pieces"),
        ("bloom", "cannot be decoded here: its own cache holds something that cannot be kept row by row"),
        ("gpt_neo", "has windows of 8 tokens that cannot be told apart"),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_one_sentence(model_type: str, message: str) -> None:
    model = MTPModel(tiny_base(model_type).eval(), HeadsConfig(horizon=2), seed=0).eval()
    with pytest.raises(ConfigError, match=message):
        generate(model, [[5, 6, 7]], max_new_tokens=12, eos_id=None)


def test_the_model_is_left_as_it_was() -> None:
    model = decoding_model("gpt2", "chained")
    model.train()
    state = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=4, eos_id=None, speculative=True, sampling=Sampling(temperature=1.0))
    assert model.training
    assert model.base.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all("forward" not in vars(layer) for layer in model.anatomy.layers)


def test_a_model_that_cannot_read_a_single_token_is_refused():
    """GIT of transformers 5.17 widens a mask of its own when it reads one token."""
    model = MTPModel(llama_base(), HeadsConfig(horizon=1), seed=0).eval()

    def break_off(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1 and kwargs["use_cache"]:
            raise RuntimeError("Tensors must have same number of dimensions")

    model.anatomy.decoder.register_forward_pre_hook(break_off, with_kwargs=True)
    with pytest.raises(ConfigError, match=r"cannot be decoded here: .*RuntimeError: Tensors must have"):
        generate(model, [[5, 6, 7]], max_new_tokens=4, eos_id=None)
