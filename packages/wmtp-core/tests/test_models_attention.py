"""Packed rows: no document sees another, by every implementation of attention that runs here."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModelForCausalLM

from wmtp.config.schema import HeadsConfig
from wmtp.models import attention
from wmtp.models.attention import document_mask
from wmtp.models.base import LoadedModel
from wmtp.models.build import build_model

POSITIONS = torch.cat([torch.arange(5), torch.arange(1), torch.arange(7)]).expand(2, -1)
IDS = torch.arange(26).view(2, 13) * 7 % 23


def make(implementation="sdpa", architecture="llama", kind="block", **options):
    config = AutoConfig.for_model(
        architecture,
        vocab_size=23,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    torch.manual_seed(0)
    ours = implementation == "wmtp"
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa" if ours else implementation).eval()
    model = build_model(LoadedModel(model=base), HeadsConfig(horizon=3, kind=kind, init="random"), 5)
    if ours:
        assert model.use_block_attention()
    return model


def run(model, ids=IDS, positions=POSITIONS, packed=True):
    with torch.compiler.set_stance("force_eager"):
        return model(ids, positions, packed).hidden


@pytest.mark.parametrize("kind", ["block", "chained"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow), "wmtp"])
def test_no_document_sees_another_and_each_comes_out_as_it_does_alone(without_the_compiler, implementation, kind):
    model = make(implementation, kind=kind).requires_grad_(implementation != "flex_attention")  # no backward pass on a CPU
    hidden = run(model)
    other = IDS.clone()
    other[:, :6] = 22 - other[:, :6]
    for mine, changed in zip(hidden, run(model, other), strict=True):
        # a chained head reads the token after the row's end, which is the row's first, at its last places
        assert torch.equal(mine[:, 6:-2], changed[:, 6:-2]), "the last document sees those before it"
        assert not torch.allclose(mine[:, :6], changed[:, :6])
    alone = run(model, IDS[:, 6:], None, packed=False)
    for mine, single in zip(hidden, alone, strict=True):
        torch.testing.assert_close(mine[:, 6:-2], single[:, :-2], rtol=1e-4, atol=1e-5)


def test_the_test_above_fails_where_the_mask_is_dropped(monkeypatch):
    model = make("wmtp")
    monkeypatch.setattr("wmtp.models.mtp.document_mask", lambda positions: attention.causal_mask(positions.device))
    changed = IDS.clone()
    changed[:, :6] = 22 - changed[:, :6]
    assert not torch.allclose(run(model)[0][:, 6:], run(model, changed)[0][:, 6:])


@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_are_those_of_transformers_own_attention(packed):
    found = []
    for implementation in ("sdpa", "wmtp"):
        model = make(implementation)
        hidden = run(model, packed=packed)
        sum((h * torch.arange(1.0, h.numel() + 1).view_as(h).sin()).sum() for h in hidden).backward()
        found.append([*hidden, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("length", [7, 128, 129, 300, 512, 1000])
def test_the_blocks_of_a_document_mask_are_those_that_torch_finds(length):
    draw = torch.Generator().manual_seed(length)
    positions = torch.zeros(3, length, dtype=torch.int64)
    for row, longest in enumerate((5, 200, length + 1)):
        start = 0
        while start < length:
            count = min(length - start, int(torch.randint(1, longest, (), generator=draw)))
            positions[row, start : start + count] = torch.arange(count)
            start += count
    positions[1, length - length // 3 :] = 0  # padding
    document = (positions == 0).cumsum(1)
    found = document_mask(positions)
    expected = create_block_mask(
        lambda b, h, q, k: (q >= k) & (document[b, q] == document[b, k]), 3, None, length, length, device="cpu"
    )
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)
    for row in range(3):
        for block in range(found.kv_num_blocks.shape[-1]):
            for name in ("kv", "full_kv"):
                count = int(getattr(found, f"{name}_num_blocks")[row, 0, block])
                mine, theirs = (getattr(mask, f"{name}_indices")[row, 0, block, :count] for mask in (found, expected))
                assert sorted(mine.tolist()) == sorted(theirs.tolist())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("mistral", {"sliding_window": 4}), ("gemma2", {"sliding_window": 4}), ("gemma3_text", {"sliding_window": 4})],
)
def test_models_with_windows_or_caps_keep_their_own_attention(architecture, options):
    model = make("sdpa" if architecture != "gemma2" else "eager", architecture, **options)
    before = model.base.config._attn_implementation
    assert not model.use_block_attention()
    assert model.base.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ["qwen3", "gemma", "olmo2"])
def test_it_serves_other_plain_architectures(architecture):
    plain, ours = make("sdpa", architecture), make("wmtp", architecture)
    for own, expected in zip(run(ours), run(plain), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_text_is_generated_and_the_model_saved_as_without_it(tmp_path):
    plain, ours = make("sdpa"), make("wmtp")
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # padding on the left
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = [model.base.generate(IDS, attention_mask=mask, **settings) for model in (plain, ours)]
    assert torch.equal(*tokens)
    ours.save_pretrained(tmp_path)
    assert "wmtp" not in (tmp_path / "config.json").read_text()
