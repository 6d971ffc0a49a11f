"""Decoding against plain loops without any cache, and against transformers' own generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from crossings import sampled
from decoded_models import ARCHITECTURES, EOS, KINDS, PROMPTS, SMALL, STATEFUL, decoding_model, plain_greedy
from native_folders import NAMES, copy_tables, native_folder
from native_plain import plain_drafting, plain_logits
from transformers import (
    MistralConfig,
    MistralForCausalLM,
)

from wmtp.config.schema import HeadsConfig
from wmtp.data.batch import Batch
from wmtp.generation import decoder as decoders
from wmtp.generation import generate
from wmtp.generation.drafters import make_drafter
from wmtp.loss import Unembedding
from wmtp.models import build_model
from wmtp.models.anatomy import record_call
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.mtp import MTPModel
from wmtp.training.evaluate import evaluate

#: heads that draft as a server does; one whose layer keeps a state (mamba2) drafts as it was trained
SERVED = {("shared", "llama"), ("shared", "qwen3_next")}


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
    text = prompt + plain_greedy(model, prompt, count)
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
    model = decoding_model(architecture, kind)
    expected = [plain_greedy(model, prompt, 12) for prompt in PROMPTS]
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
    model = decoding_model(architecture, kind, 4)
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
        assert list(row.tokens) == plain_greedy(model, prompt, 10)
        counts = (row.drafts.steps, list(row.drafts.tested), list(row.drafts.accepted))
        assert counts == _plain_speculation(model, prompt, 10)


def test_some_drafts_are_accepted_at_every_head_and_some_are_not() -> None:
    rows = generate(decoding_model("gpt2", "linear"), PROMPTS, max_new_tokens=40, eos_id=None, speculative=True)
    tested = [sum(row.drafts.tested[k] for row in rows) for k in range(3)]
    accepted = [sum(row.drafts.accepted[k] for row in rows) for k in range(3)]
    assert all(0 < a < t for a, t in zip(accepted, tested, strict=True)), (tested, accepted)
    for row in rows:
        assert len(row.tokens) - 1 <= row.drafts.steps + sum(row.drafts.accepted)
        assert row.tokens_per_forward > 0.99


def test_measured_along_its_own_text_a_model_needs_the_passes_that_decoding_took() -> None:
    model = decoding_model("gpt2", "linear")
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
    model = decoding_model("llama", "chained")
    for prompt, row in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=20, eos_id=EOS, speculative=True), strict=True):
        settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
        whole = model.base.generate(torch.tensor([prompt]), **settings)[0].tolist()  # type: ignore[operator]
        assert list(row.tokens) == whole[len(prompt) :]


@pytest.mark.parametrize("horizon", [2, 3, 6])
@pytest.mark.parametrize("kind", ["block", "shared"])
def test_other_horizons_and_eager_attention(horizon: int, kind: str) -> None:
    model = decoding_model("llama", kind, horizon)
    expected = [plain_greedy(model, prompt, 15) for prompt in PROMPTS]
    model.base.set_attn_implementation("eager")
    rows = generate(model, PROMPTS, max_new_tokens=15, eos_id=EOS, speculative=True)
    assert [list(row.tokens) for row in rows] == expected


def test_tied_tokens_are_the_same_at_every_batch_size_and_with_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoding_model("llama", "block")
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


def test_a_row_goes_on_beyond_the_window() -> None:
    base = MistralForCausalLM(MistralConfig(**SMALL | {"sliding_window": 16})).eval()
    model = MTPModel(base, HeadsConfig(horizon=3), seed=1).eval()
    prompts = [[5, 6, 7], [8] * 20]
    expected = [plain_greedy(model, prompt, 30, eos=None) for prompt in prompts]
    for speculative in (False, True):
        rows = generate(model, prompts, max_new_tokens=30, eos_id=None, speculative=speculative)
        assert [list(row.tokens) for row in rows] == expected
