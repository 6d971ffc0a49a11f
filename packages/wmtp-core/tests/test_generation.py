"""Decoding against plain loops without any cache, and against transformers' own generate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from crossings import sampled
from native_folders import NAMES, copy_tables, native_folder
from native_plain import plain_drafting, plain_logits
from tiny_config import tiny_config
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import Batch
from wmtp.errors import ConfigError
from wmtp.generation import Sampling, generate, stream
from wmtp.generation import decoder as decoders
from wmtp.generation.drafters import make_drafter
from wmtp.generation.sampling import draw, probabilities
from wmtp.generation.step import Step
from wmtp.loss import Unembedding
from wmtp.models import build_model
from wmtp.models.anatomy import record_call
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.mtp import MTPModel
from wmtp.training.evaluate import evaluate

KINDS = ("block", "linear", "residual", "chained", "shared")
#: heads that draft as a server does; one whose layer keeps a state (mamba2) drafts as it was trained
SERVED = {("shared", "llama"), ("shared", "qwen3_next")}
PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3], [20, 21], [30, 31] * 8]
EOS = 3
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def _llama(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes))


def _gpt2(**changes: object) -> PreTrainedModel:
    options = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**options | changes, bos_token_id=None, eos_token_id=None))


def _qwen3(**changes: object) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL | {"head_dim": 8} | changes))


def _tiny(model_type: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(tiny_config(model_type))


ARCHITECTURES = {"llama": _llama, "gpt2": _gpt2, "qwen3": _qwen3}
# layers with a state: the last one attends in one, and keeps a state in the other, so that heads do
STATEFUL = {"qwen3_next": partial(_tiny, "qwen3_next"), "mamba2": partial(_tiny, "mamba2")}
WINDOWS = {"gpt_oss": partial(_tiny, "gpt_oss"), "mistral": partial(_tiny, "mistral")}
PAIRS = {"bamba": partial(_tiny, "bamba")}  # its layers return two things


def _model(architecture: str = "llama", kind: str = "block", horizon: int = 4, **changes: object) -> MTPModel:
    torch.manual_seed(0)
    base = (ARCHITECTURES | STATEFUL | WINDOWS | PAIRS)[architecture](**changes).eval()
    model = MTPModel(base, HeadsConfig(horizon=horizon, kind=kind, init="copy"), seed=1).eval()  # type: ignore[arg-type]
    with torch.no_grad():  # heads that are nearly head 1's own: some drafts are right in a text that repeats itself
        for parameter in model.extra_heads.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model


@torch.no_grad()
def _plain_greedy(model: MTPModel, prompt: list[int], count: int, eos: int | None = EOS) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(model.base(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


@torch.no_grad()
def _plain_drafts(model: MTPModel, tokens: list[int]) -> list[int]:
    """The drafts after ``tokens``, of which the last is head 1's own; every head's pass is made anew."""
    if model.heads.kind in ("shared", "native"):
        return [int(logits.argmax()) for logits in _served_logits(model, tokens)]
    drafts: list[int] = []
    for k in range(2, model.horizon + 1):
        ids = torch.tensor([tokens + drafts])
        drafts.append(int(model.logits(model(ids), k)[0, len(tokens) - 2].argmax()))
    return drafts


@torch.no_grad()
def _served_logits(model: MTPModel, tokens: list[int], drafts: list[int] | None = None) -> list[torch.Tensor]:
    """Logits of heads 2..H after greedy drafts, or these, as a server makes them with one module, written without a cache.

    Of every position before it, a step sees what the first step made of it: of the model's own hidden state there.
    """
    anatomy, block = model.anatomy, model.extra_heads[0]
    # the layer of the model that the module is like: it has a window where the last one has none
    like = anatomy.layers[0 if model.native is not None and model.native.layout == "exaone" else -1]
    with record_call(anatomy.layers[-1]) as calls:
        final = anatomy.decoder(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).last_hidden_state
    raw = calls[0].repeat(anatomy.layers[-1], calls[0].hidden_states)
    previous = raw if block.rule.before_norm else final
    found: list[torch.Tensor] = []
    for k in range(2, model.horizon + 1):
        known = [int(logits.argmax()) for logits in found] if drafts is None else drafts[: k - 2]
        ids = torch.tensor([tokens[1:] + known])
        embedding = anatomy.embedding(ids).clone()
        if block.rule.zero_first:
            embedding[:, 0] = 0
        with record_call(like) as calls:
            anatomy.decoder(input_ids=ids, use_cache=False)
        hidden = block(previous, embedding, calls[0])[:, -1:]
        found.append(model.unembedding(k).logits(hidden)[0, 0])
        previous = torch.cat([previous, hidden], dim=1)
    assert previous.shape[1] == len(tokens) + model.horizon - 2
    return found


def _plain_speculation(model: MTPModel, prompt: list[int], count: int) -> tuple[int, list[int], list[int]]:
    """Steps, and for heads 2..H how many drafts were tested and accepted, when the text is the greedy one."""
    text = prompt + _plain_greedy(model, prompt, count)
    steps, tested, accepted, known = 0, [0] * (model.horizon - 1), [0] * (model.horizon - 1), len(prompt) + 1
    while known < len(text):
        drafts = _plain_drafts(model, text[:known])
        steps += 1
        for head, draft in enumerate(drafts):
            if known >= len(text):
                break
            tested[head] += 1
            right = draft == text[known]
            accepted[head] += right
            known += 1
            if not right:
                break
        else:
            known += 1
    return steps, tested, accepted


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *sampled(product(ARCHITECTURES, KINDS), 3),
        # mamba2 without its kernels is many times slower than the others: of it, the next test has the sample
        *sampled(((name, kind) for kind in ("chained", "block") for name in STATEFUL), 4),
        ("gpt_oss", "shared"),
        pytest.param("mistral", "block", marks=pytest.mark.slow),
    ],
)
def test_greedy_text_and_drafts_are_those_of_plain_loops(architecture: str, kind: str) -> None:
    model = _model(architecture, kind)
    expected = [_plain_greedy(model, prompt, 12) for prompt in PROMPTS]
    settings = {"max_new_tokens": 12, "eos_id": EOS}
    plain = generate(model, PROMPTS, **settings)
    assert [list(row.tokens) for row in plain] == expected
    assert [row.drafts.steps for row in plain] == [len(tokens) - 1 for tokens in expected]
    together = generate(model, PROMPTS, **settings, speculative=True)
    alone = [generate(model, [prompt], **settings, speculative=True)[0] for prompt in PROMPTS[1::3]]
    assert [list(row.tokens) for row in together] == expected
    assert alone == together[1::3], "the shortest and the longest"
    for row, prompt in list(zip(together, PROMPTS, strict=True))[2:5]:
        steps, tested, accepted = _plain_speculation(model, prompt, 12)
        assert (row.drafts.steps, list(row.drafts.tested), list(row.drafts.accepted)) == (steps, tested, accepted)
    for row, tokens in zip(plain, expected, strict=True):
        assert row.finish == ("eos" if tokens[-1] == EOS else "length")


#: drafts accepted after each forward pass: none, some, all, and all several times in a row
ACCEPTED = (3, 3, 0, 3, 1, 3, 3, 2, 0, 0, 3, 3)


def _forced_drafts(
    model: MTPModel, runs: Sequence[int], vocabulary: int = 97
) -> Iterator[tuple[list[int], list[int], list[torch.Tensor]]]:
    """Decode a given text with a cache, and with drafts of which as many are right as said.

    Yields:
        the text so far with head 1's choice, the drafts of heads 2..H, and the logits ``[V]`` that each was drawn from.
    """
    text = (torch.arange(64) * 37 + 11).remainder(vocabulary).tolist()
    horizon = model.horizon
    decoder = decoders.CachedDecoder(model, 80)
    drafter = make_drafter(model, decoder, horizon - 1)
    slots = torch.arange(6)[None]
    read, last = decoder.read(torch.tensor([text[:6]]), slots, 0, 6, lengths=[6]), 5
    for accepted in runs:
        right = text[last + 2 : last + 1 + horizon]
        drafts = [token if place < accepted else (token + 1) % vocabulary for place, token in enumerate(right)]
        seen: list[torch.Tensor] = []

        def choose(
            head: int, unembedding: Unembedding, _: torch.Tensor | None, hidden: torch.Tensor, at: torch.Tensor | None,
            drafts: list[int] = drafts, seen: list[torch.Tensor] = seen,
        ) -> torch.Tensor:  # fmt: skip
            hidden = hidden if at is None else hidden[:, at[0]]
            seen.extend(unembedding.logits(hidden)[0])
            return torch.tensor([drafts[head - 2 :][: hidden.shape[1]]])

        known = torch.tensor([text[: last + 2] + [0] * (80 - last)])
        assert drafter.draft(read, torch.tensor([last]), known, choose).tolist() == [drafts]
        yield text[: last + 2], drafts, seen
        slots = torch.arange(last + 1, last + 1 + horizon)[None]
        read = decoder.read(torch.tensor([[text[last + 1], *drafts]]), slots, last + 1, last + 1 + horizon)
        last += 1 + accepted


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*product(["llama"], KINDS), *product(STATEFUL, ("block", "linear", "shared")), ("gpt_oss", "block"), ("bamba", "chained")],
)
@torch.no_grad()
def test_drafts_after_any_run_of_accepted_ones_are_those_of_a_full_pass(architecture: str, kind: str) -> None:
    """Whatever was accepted before, up to all drafts several times in a row, every head's logits are those without a cache."""
    model = _model(architecture, kind, 4)
    for text, drafts, seen in _forced_drafts(model, ACCEPTED):
        output = model(torch.tensor([text + drafts]))
        served = _served_logits(model, text, drafts) if (kind, architecture) in SERVED else []
        for head, logits in enumerate(seen, start=2):
            expected = served[head - 2] if served else model.logits(output, head)[0, len(text) - 2]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_models_own_layer_drafts_from_the_logits_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    """Few drafts of random weights are accepted, so the counts of accepted ones tell little; the logits tell all.

    One module drafts as servers do, several as they are trained.
    """
    folder = native_folder(tmp_path / "base", name)
    loaded = HfLoader().load(folder, dtype=torch.float64, seed=0)
    loaded.model.set_experts_implementation("eager")  # the others have no float64
    model = build_model(loaded, HeadsConfig(horizon=4), seed=0).eval()
    for text, drafts, seen in _forced_drafts(model, ACCEPTED[:5]):
        if name in ("mimo_2", "deepseek_v3"):
            rows = plain_logits(name, folder, torch.tensor([text + drafts]), 4)[1:]
            expected = [logits[0, len(text) - 2] for logits in rows]
        else:
            expected = plain_drafting(name, folder, text, drafts)
        assert len(seen) == len(expected) == 3
        for logits, wanted in zip(seen, expected, strict=True):
            torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["mimo", "glm4_moe", "exaone"])
def test_a_models_own_layer_drafts_as_in_a_plain_loop_of_a_server(name: str, tmp_path: Path) -> None:
    copy_tables(native_folder(tmp_path / "base", name))
    model = build_model(HfLoader().load(tmp_path / "base", dtype=torch.float32, seed=0), HeadsConfig(horizon=4), seed=0).eval()
    assert model.heads.kind == "native"
    for prompt in PROMPTS[2:]:
        [row] = generate(model, [prompt], max_new_tokens=10, eos_id=EOS, speculative=True)
        assert list(row.tokens) == _plain_greedy(model, prompt, 10)
        counts = (row.drafts.steps, list(row.drafts.tested), list(row.drafts.accepted))
        assert counts == _plain_speculation(model, prompt, 10)


def test_some_drafts_are_accepted_at_every_head_and_some_are_not() -> None:
    rows = generate(_model("gpt2", "linear"), PROMPTS, max_new_tokens=40, eos_id=None, speculative=True)
    tested = [sum(row.drafts.tested[k] for row in rows) for k in range(3)]
    accepted = [sum(row.drafts.accepted[k] for row in rows) for k in range(3)]
    assert all(0 < a < t for a, t in zip(accepted, tested, strict=True)), (tested, accepted)
    for row in rows:
        assert len(row.tokens) - 1 <= row.drafts.steps + sum(row.drafts.accepted)
        assert row.tokens_per_forward > 0.99


def test_measured_along_its_own_text_a_model_needs_the_passes_that_decoding_took() -> None:
    model = _model("gpt2", "linear")
    rows = generate(model, PROMPTS, max_new_tokens=40, eos_id=None, speculative=True)
    texts = [prompt + list(row.tokens) for prompt, row in zip(PROMPTS, rows, strict=True)]
    longest = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), longest, dtype=torch.int64), torch.zeros(len(texts), longest, dtype=torch.bool)
    for place, (text, prompt) in enumerate(zip(texts, PROMPTS, strict=True)):
        ids[place, : len(text)] = torch.tensor(text)
        mask[place, len(prompt) : len(text)] = True
    document = torch.arange(len(texts))[:, None].expand(ids.shape)
    batch = Batch(
        input_ids=ids, document=document, position=torch.arange(longest).expand(ids.shape), loss_mask=mask, documents=()
    )
    found = evaluate(model, [batch], torch.device("cpu"), nullcontext)
    passes = sum(row.drafts.steps for row in rows)
    assert found["eval/tokens_per_forward"] == pytest.approx(sum(len(row.tokens) - 1 for row in rows) / passes)
    assert found["eval/tokens_per_forward"] < 1 + sum(found[f"eval/accepted/depth_{depth}"] for depth in (1, 2, 3))


def test_it_is_what_transformers_generates() -> None:
    model = _model("llama", "chained")
    for prompt, row in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=20, eos_id=EOS, speculative=True), strict=True):
        settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
        whole = model.base.generate(torch.tensor([prompt]), **settings)[0].tolist()  # type: ignore[operator]
        assert list(row.tokens) == whole[len(prompt) :]


@pytest.mark.parametrize("horizon", [2, 3, 6])
@pytest.mark.parametrize("kind", ["block", "shared"])
def test_other_horizons_and_eager_attention(horizon: int, kind: str) -> None:
    model = _model("llama", kind, horizon)
    expected = [_plain_greedy(model, prompt, 15) for prompt in PROMPTS]
    model.base.set_attn_implementation("eager")
    rows = generate(model, PROMPTS, max_new_tokens=15, eos_id=EOS, speculative=True)
    assert [list(row.tokens) for row in rows] == expected


def test_tied_tokens_are_the_same_at_every_batch_size_and_with_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama", "block")
    with torch.no_grad():  # every token has a twin: its logit is the same but for rounding
        model.anatomy.output.weight[1::2] = model.anatomy.output.weight[:-1:2] * (1 + 1e-7)
    # which twin a plain loop takes is rounding too: what counts is that it is always the same one
    expected = [list(generate(model, [prompt], max_new_tokens=20, eos_id=EOS)[0].tokens) for prompt in PROMPTS]
    read_alone = []
    original = decoders.CachedDecoder.last_logits_alone
    monkeypatch.setattr(
        decoders.CachedDecoder, "last_logits_alone", lambda self, ids: read_alone.append(len(ids)) or original(self, ids)
    )
    for prompts, texts in ((PROMPTS, expected), ([PROMPTS[0]], [expected[0]]), (PROMPTS[1:3], expected[1:3])):
        for speculative in (False, True):
            rows = generate(model, prompts, max_new_tokens=20, eos_id=EOS, speculative=speculative)
            assert [list(row.tokens) for row in rows] == texts
    assert read_alone


def test_streamed_tokens_are_the_generated_ones() -> None:
    model = _model("gpt2", "residual")
    whole = generate(model, [PROMPTS[0]], max_new_tokens=30, eos_id=EOS)[0]
    pieces = list(stream(model, PROMPTS[0], max_new_tokens=30, eos_id=EOS, speculative=True))
    assert [token for piece in pieces for token in piece] == list(whole.tokens)
    assert len(pieces) <= len(whole.tokens)


def test_threads_take_turns_at_one_model() -> None:
    """Hooks of one thread's step would see the calls of another's."""
    model = _model("gpt2", "block").train()
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
        model = _model(architecture, "block")
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
        generate(_model(), prompts, **{"max_new_tokens": 4, "eos_id": None, **options})  # type: ignore[arg-type]


def test_speculation_needs_extra_heads() -> None:
    model = _model(horizon=1)
    with pytest.raises(ConfigError, match="no extra heads"):
        generate(model, [[1]], max_new_tokens=4, eos_id=None, speculative=True)
    assert generate(model, [[1]], max_new_tokens=4, eos_id=None)


def test_a_row_goes_on_beyond_the_window() -> None:
    base = MistralForCausalLM(MistralConfig(**SMALL | {"sliding_window": 16})).eval()
    model = MTPModel(base, HeadsConfig(horizon=3), seed=1).eval()
    prompts = [[5, 6, 7], [8] * 20]
    expected = [_plain_greedy(model, prompt, 30, eos=None) for prompt in prompts]
    for speculative in (False, True):
        rows = generate(model, prompts, max_new_tokens=30, eos_id=None, speculative=speculative)
        assert [list(row.tokens) for row in rows] == expected


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("doge", "gives another result when it reads a text in pieces"),
        ("bloom", "cannot be decoded here: its own cache holds something that cannot be kept row by row"),
        ("gpt_neo", "has windows of 8 tokens that cannot be told apart"),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_one_sentence(model_type: str, message: str) -> None:
    model = MTPModel(_tiny(model_type).eval(), HeadsConfig(horizon=2), seed=0).eval()
    with pytest.raises(ConfigError, match=message):
        generate(model, [[5, 6, 7]], max_new_tokens=12, eos_id=None)


def test_the_model_is_left_as_it_was() -> None:
    model = _model("gpt2", "chained")
    model.train()
    state = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=4, eos_id=None, speculative=True, sampling=Sampling(temperature=1.0))
    assert model.training
    assert model.base.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all("forward" not in vars(layer) for layer in model.anatomy.layers)


@pytest.mark.parametrize("kind", ["block", "linear", "shared"])
def test_sampling_has_head_1s_distribution(kind: str) -> None:
    """The first three new tokens of many rows against their exact joint probabilities (chi-square)."""
    model = _model("llama", kind, 4, vocab_size=5, initializer_range=0.5)
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5)
    prompt, rows = [1, 2, 4], 3000
    joint = {}
    with torch.no_grad():
        firsts = probabilities(model.base(torch.tensor([prompt])).logits[0, -1], sampling)
        for a in range(5):
            seconds = probabilities(model.base(torch.tensor([[*prompt, a]])).logits[0, -1], sampling)
            for b in range(5):
                thirds = probabilities(model.base(torch.tensor([[*prompt, a, b]])).logits[0, -1], sampling)
                joint |= {(a, b, c): float(firsts[a] * seconds[b] * thirds[c]) for c in range(5)}
    generated = generate(model, [prompt] * rows, max_new_tokens=3, eos_id=None, speculative=True, sampling=sampling)
    tested, accepted = (sum(getattr(row.drafts, name)[0] for row in generated) for name in ("tested", "accepted"))
    assert 0.02 < accepted / tested < 0.98  # both ways of going on are tried
    counts = dict.fromkeys(joint, 0)
    for row in generated:
        counts[row.tokens] += 1
    assert not [tokens for tokens, probability in joint.items() if probability == 0 and counts[tokens]]
    likely = [tokens for tokens, probability in joint.items() if probability * rows >= 5]
    rest = rows - sum(counts[tokens] for tokens in likely), rows * (1 - sum(joint[tokens] for tokens in likely))
    cells = [(counts[tokens], joint[tokens] * rows) for tokens in likely] + ([rest] if rest[1] >= 5 else [])
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    # Wilson-Hilferty: above this with a probability of 1e-4
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3, (statistic, freedom)


def test_every_random_number_together_gives_head_1s_distribution_exactly() -> None:
    """One step with two drafts, over all of them and a grid of uniform numbers where every probability is a whole count."""
    n, size = 12, 4
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])  # p / q is 1/4 or 2/3, and what is left of p after a rejection 1/4 and 3/4
    q = p.flip(0)
    first, second = torch.tensor([2, 0, 3, 1]), torch.stack([torch.arange(size).roll(row) for row in range(size)])
    p1, q1 = p[first], q[first]
    p2, q2 = p[second], q[second]  # [first token, V]
    p3 = torch.tensor([0.25, 0.5, 0.25, 0.0])[(second[:, None] + torch.arange(size)[:, None]) % size]  # [first, second, V]
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = torch.arange(size, dtype=torch.float64)
    cases = torch.cartesian_prod(tokens, tokens, grid, grid, grid)
    a, b, rows = cases[:, 0].long(), cases[:, 1].long(), torch.arange(len(cases))
    step = SimpleNamespace(
        _sampling=Sampling(temperature=1.0),
        _drafts=torch.stack([a, b], 1),
        _draft_probs=torch.stack([q1.expand(len(a), -1), q2[a]], 1),
        _uniform=cases[:, 2:],
        _rows=rows,
        _known=rows,
    )
    logits = torch.stack([p1.expand(len(a), -1), p2[a], p3[a, b]], 1).log()
    accepted, following = Step._verify_sampled(step, logits)  # type: ignore[arg-type]
    weight = (q1[a] * q2[a, b]).double() / n**3

    def found(where: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
        place = sum(token[where] * size**power for power, token in enumerate(reversed(tokens)))
        counts = torch.zeros(size ** len(tokens), dtype=torch.float64).index_add(0, place, weight[where])
        return counts.view([size] * len(tokens)).float()

    torch.testing.assert_close(found(accepted >= 0, torch.where(accepted > 0, a, following)), p1)
    one = torch.minimum(p1, q1)
    torch.testing.assert_close(found(accepted > 0, a, torch.where(accepted > 1, b, following)), one[:, None] * p2)
    both = one[:, None] * torch.minimum(p2, q2)
    torch.testing.assert_close(found(accepted > 1, a, b, following), both[..., None] * p3)


def test_a_rows_draws_do_not_depend_on_its_batch() -> None:
    model = _model("llama", "block")
    settings = {"max_new_tokens": 12, "eos_id": EOS, "sampling": Sampling(temperature=1.0, seed=3), "speculative": True}
    together = generate(model, PROMPTS, **settings)
    assert [generate(model, [p], rows=[n], **settings)[0] for n, p in enumerate(PROMPTS)] == together
    assert generate(model, [PROMPTS[0]], rows=[7], **settings)[0].tokens != together[0].tokens


def test_probabilities_and_draws() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    nucleus = probabilities(logits, Sampling(temperature=1.0, top_p=0.8))
    torch.testing.assert_close(nucleus, torch.tensor([0.625, 0.375, 0.0, 0.0]))
    torch.testing.assert_close(probabilities(logits, Sampling(temperature=0.5)), torch.softmax(2 * logits, -1))
    uniform = torch.from_numpy(np.linspace(0, 1, 1001)[:-1])
    drawn = draw(nucleus.expand(1000, -1), uniform)
    assert drawn.bincount(minlength=4).tolist() == [625, 375, 0, 0]
    assert draw(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1.0 - 1e-17])).tolist() == [1]


def test_a_model_that_cannot_read_a_single_token_is_refused():
    """GIT of transformers 5.17 widens a mask of its own when it reads one token."""
    model = MTPModel(_llama(), HeadsConfig(horizon=1), seed=0).eval()

    def break_off(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1 and kwargs["use_cache"]:
            raise RuntimeError("Tensors must have same number of dimensions")

    model.anatomy.decoder.register_forward_pre_hook(break_off, with_kwargs=True)
    with pytest.raises(ConfigError, match=r"cannot be decoded here: .*RuntimeError: Tensors must have"):
        generate(model, [[5, 6, 7]], max_new_tokens=4, eos_id=None)
