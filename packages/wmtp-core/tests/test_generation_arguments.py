"""Arguments of a model's `generate`: each form that is meant, and one sentence for each that is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from chat_tokenizers import INST, chat_tokenizer
from tiny_config import tiny_config
from transformers import AutoModelForCausalLM

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.generation import Sampling
from wmtp.generation.sampling import probabilities
from wmtp.generation.text import generate_texts
from wmtp.models.mtp import MTPModel


@pytest.fixture(scope="module")
def model() -> MTPModel:
    torch.manual_seed(0)
    return MTPModel(AutoModelForCausalLM.from_config(tiny_config("llama")), HeadsConfig(horizon=2), seed=0).eval()


def test_token_ids_of_any_kind(model: MTPModel) -> None:
    expected = model.generate([5, 6, 7], max_new_tokens=3, eos_id=[])
    for one in (torch.tensor([5, 6, 7]), np.array([5, 6, 7]), (np.int64(5), 6, 7)):
        assert model.generate(one, max_new_tokens=3, eos_id=[]) == expected
    for several in (torch.tensor([[5, 6, 7]]), np.array([[5, 6, 7]]), [torch.tensor([5, 6, 7])], [(5, 6, 7)]):
        assert model.generate(several, max_new_tokens=3, eos_id=[]) == [expected]  # type: ignore[arg-type]
    first = expected.tokens[0]
    assert model.generate([5, 6, 7], max_new_tokens=3, eos_id=np.int64(first)).finish == "eos"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ({"input_ids": [5]}, {}, "prompts: give a text, token ids, or a list of several, not dict"),
        (None, {}, "not NoneType"),
        ([5.5, 6.0], {}, r"prompts: token ids are whole numbers, not 5\.5"),
        (torch.ones(1, 2, 2, dtype=torch.int64), {}, "token ids are whole numbers"),
        (["a text", [5]], {}, "prompts: token ids are whole numbers, not 'a text'"),
        ([5], {"eos_id": "</s>"}, "eos_id: token ids are whole numbers, not '</s>'"),
        ([5], {"eos_id": 10**6}, "eos_id: 1000000 is outside the model's vocabulary"),
        ([5], {"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number, at least 1, not 2\.5"),
        ([5], {"max_new_tokens": None}, "not None"),
        ([5], {"temperature": "1"}, "'temperature' must be"),
        ([5], {"temperature": 1.0, "seed": 1.5}, "'seed' must be"),
        ([5], {"top_p": 0.9}, "top_p: has no effect: temperature 0"),
    ],
)
def test_other_arguments_are_named(model: MTPModel, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate(prompts, **{"max_new_tokens": 3, "eos_id": []} | options)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("END", r"stop: is one text, not several; write \['END'\]"),
        ([""], "an empty text"),
        (["a", 13], "stop: 13 is no text; give texts, or eos_id for a token"),
        ([None], "stop: None is no text"),
    ],
)
def test_stop_texts_that_cannot_be_meant_are_refused(model: MTPModel, tmp_path, stop: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_texts(model, chat_tokenizer(tmp_path, INST), [[5]], max_new_tokens=3, stop=stop)


def test_the_smallest_temperature_and_share_leave_the_best_token() -> None:
    logits = torch.tensor([3.0, -80.0, 30.0, 29.9])
    for sampling in (Sampling(temperature=1e-300), Sampling(temperature=1.0, top_p=1e-300)):
        assert probabilities(logits, sampling).tolist() == [0, 0, 1, 0]


def test_a_request_beyond_the_memory_is_refused_where_nothing_else_limits_it() -> None:
    """A model that keeps states alone has neither positions nor a cache that grows."""
    model = MTPModel(AutoModelForCausalLM.from_config(tiny_config("mamba2")), HeadsConfig(horizon=1), seed=0).eval()
    with pytest.raises(ConfigError, match=r"table of ids of 1 rows of up to 10,000,000,000,004 tokens takes .*max_new_tokens"):
        model.generate([5], max_new_tokens=10**13, eos_id=[])
