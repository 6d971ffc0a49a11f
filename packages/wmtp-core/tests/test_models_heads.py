"""Heads on every shape of model: head 1 stays the model, documents stay apart, gradients go where they should."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny_config import tiny_config
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.models import LoadedModel, MTPModel, build_model
from wmtp.models.heads_folder import HEADS_CONFIG
from wmtp.models.loaders.hf import HfLoader

VOCAB = 61
KINDS = ("block", "linear", "residual", "chained", "shared")
# wide random weights: with the usual small ones attention hardly moves the hidden states, and a leak would hide
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SHAPES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 3},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 48},
    "gemma2": {
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 3,
        "final_logit_softcapping": 2.0,
    },
    "phi": {"intermediate_size": 48},
    "gptj": {"rotary_dim": 4},
    "cohere": {"num_key_value_heads": 2, "intermediate_size": 48, "logit_scale": 0.3},
    "granite": {"num_key_value_heads": 2, "intermediate_size": 48, "logits_scaling": 6.0},
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4},
}


def make(shape: str, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape, **{**COMMON, **SHAPES[shape], **options})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero after initialization: a lost bias would not show
                parameter.normal_()
    return model


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on models this small a second thread only waits
    yield
    torch.set_num_threads(threads)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_head_1_gives_the_models_own_logits_bit_for_bit(shape: str, dtype: torch.dtype):
    base = make(shape, dtype)
    ids = tokens(2, 9)
    # a cache only lays the keys out in another way, but for GPT-J that is enough to round differently
    expected = base(input_ids=ids, use_cache=False).logits
    model = MTPModel(base, HeadsConfig(horizon=3), seed=0)
    output = model(ids)
    assert len(output.hidden) == 3
    assert output.trunk.shape == (2, 9, 32)
    assert torch.equal(model.logits(output, 1), expected)
    assert torch.equal(base(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("shape", "kind"), [("llama", kind) for kind in KINDS] + [(s, "block") for s in SHAPES if s != "llama"]
)
def test_documents_in_one_row_are_as_if_alone(shape: str, kind: str):
    model = MTPModel(make(shape), HeadsConfig(horizon=3, kind=kind, init="random"), seed=0)
    documents = [tokens(1, length) for length in (4, 5, 7)]
    row = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).unsqueeze(0)
    with torch.no_grad():
        packed = model(row, positions, True)
        start = 0
        for document in documents:
            length = document.shape[1]
            alone = model(document, None, False)
            for head in (1, 2, 3):
                # head k's prediction at t is valid only where t + k is inside the document
                valid = slice(0, length - head)
                here = model.logits(packed, head)[:, start : start + length][:, valid]
                torch.testing.assert_close(here, model.logits(alone, head)[:, valid], rtol=1e-4, atol=1e-4)
            start += length


@pytest.mark.parametrize("shape", ["llama", "mistral", "gpt2", "gpt_neox"])
def test_padding_on_the_right_changes_nothing(shape: str):
    model = MTPModel(make(shape), HeadsConfig(horizon=3), seed=0)
    document = tokens(1, 6)
    row = torch.cat([document, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        padded, alone = model(row), model(document)
    for head in (1, 2, 3):
        torch.testing.assert_close(model.logits(padded, head)[:, :6], model.logits(alone, head), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma2"])
def test_block_heads_are_a_layer_on_the_trunk(shape: str):
    """Head k must give what the model would give with that head in place of its last layer."""
    base = make(shape)
    model = MTPModel(base, HeadsConfig(horizon=3, kind="block", init="random"), seed=4)
    ids = tokens(2, 8)
    with torch.no_grad():
        output = model(ids)
        for head in (2, 3):
            other = copy.deepcopy(base)
            layers = other.transformer.h if shape == "gpt2" else other.model.layers
            layers[-1].load_state_dict(model.extra_heads[head - 2].state_dict())
            torch.testing.assert_close(model.logits(output, head), other(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["block", "linear", "residual"])
def test_copied_heads_begin_as_head_1(kind: str):
    model = MTPModel(make("llama"), HeadsConfig(horizon=3, kind=kind), seed=0)
    output = model(tokens(2, 8))
    for head in (2, 3):
        torch.testing.assert_close(model.logits(output, head), model.logits(output, 1))


@pytest.mark.parametrize("shape", ["llama", "qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_heads_come_from_the_seed_alone(kind: str, shape: str):
    base = make(shape)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    heads = HeadsConfig(horizon=3, kind=kind, init="random")
    first = MTPModel(base, heads, seed=1).extra_heads.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = MTPModel(base, heads, seed=1).extra_heads.state_dict()
    other = MTPModel(base, heads, seed=2).extra_heads.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name, tensor in first.items() if tensor.dim() == 2]
    assert matrices
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert all(tensor.isfinite().all() for tensor in first.values())


def test_wrapping_changes_neither_training_modes_nor_parameters():
    base = make("llama")
    base.train()
    base.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = MTPModel(base, HeadsConfig(horizon=2), seed=0)
    assert base.training
    assert not base.model.layers[0].training
    assert base.model.layers[1].training
    assert model.base is base
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not base.model.layers[-1]._forward_pre_hooks


def _gradients(model: MTPModel, ids: torch.Tensor, heads: tuple[int, ...]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(ids)
    loss = sum(F.cross_entropy(model.logits(output, k)[:, :-k].flatten(0, 1), ids[:, k:].flatten()) for k in heads)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_gradient_of_the_extra_heads(shape: str, kind: str):
    ids = tokens(2, 9)
    base = make(shape)  # gpt2's embeddings are tied: the trunk's input and the unembedding are one
    joint = MTPModel(base, HeadsConfig(horizon=3, kind=kind, init="random"), seed=0)
    reached = _gradients(joint, ids, (2, 3))
    trunk = [name for name in reached if ".layers.0." in name or ".h.0." in name]
    assert trunk
    every_head = {name for name, _ in joint.named_parameters() if name.startswith("extra_heads")}
    assert every_head <= set(reached)

    detached = MTPModel(base, HeadsConfig(horizon=3, kind=kind, init="random", trunk_gradient="detach"), seed=0)
    reached = _gradients(detached, ids, (2, 3))
    assert set(reached) == every_head
    alone, together = _gradients(detached, ids, (1,)), _gradients(detached, ids, (1, 2, 3))
    assert all(torch.equal(together[name], alone[name]) for name in alone)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_extra_heads_falls(kind: str):
    ids = tokens(4, 12)
    model = MTPModel(make("llama"), HeadsConfig(horizon=3, kind=kind, trunk_gradient="detach"), seed=0)
    optimizer = torch.optim.Adam(model.extra_heads.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        output = model(ids)
        loss = sum(F.cross_entropy(model.logits(output, k)[:, :-k].flatten(0, 1), ids[:, k:].flatten()) for k in (2, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_chained_heads_read_the_token_before_the_target_and_no_later_one():
    model = MTPModel(make("llama"), HeadsConfig(horizon=3, kind="chained", init="random"), seed=0)
    ids = tokens(1, 10)
    with torch.no_grad():
        before = model(ids)
        for head in (2, 3):
            position = 4
            for ahead in range(1, 5):
                changed = ids.clone()
                changed[0, position + ahead] = (changed[0, position + ahead] + 1) % VOCAB
                after = model(changed)
                same = torch.equal(after.hidden[head - 1][0, position], before.hidden[head - 1][0, position])
                assert same == (ahead >= head), (head, ahead)


def test_a_row_shorter_than_the_horizon():
    for kind in KINDS:
        output = MTPModel(make("llama"), HeadsConfig(horizon=4, kind=kind), seed=0)(tokens(1, 2))
        assert [hidden.shape for hidden in output.hidden] == [(1, 2, 32)] * 4


def test_one_head_is_the_plain_model():
    model = MTPModel(make("llama"), HeadsConfig(horizon=1), seed=0)
    assert len(model(tokens(1, 5)).hidden) == 1
    assert not list(model.extra_heads.parameters())
    with pytest.raises(ValueError, match=r"head must be in 1\.\.1, not 2"):
        model.unembedding(2)


def test_a_model_of_one_layer():
    base = make("llama", num_hidden_layers=1)
    model = MTPModel(base, HeadsConfig(horizon=2), seed=0)
    ids = tokens(1, 5)
    output = model(ids)
    assert torch.equal(output.trunk, base.model.embed_tokens(ids))
    assert torch.equal(model.logits(output, 1), base(input_ids=ids).logits)


def test_sizes():
    model = MTPModel(make("llama"), HeadsConfig(horizon=2), seed=0)
    assert (model.horizon, model.hidden_size, model.vocab_size, model.max_positions) == (2, 32, VOCAB, 64)


def test_an_encoder_decoder_is_refused():
    base = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    with pytest.raises(ConfigError, match=r"models\.base: T5ForConditionalGeneration .* encoder-decoder"):
        MTPModel(base, HeadsConfig(), seed=0)


def test_a_model_whose_hidden_states_stay_in_fp32_is_refused_in_bf16():
    base = AutoModelForCausalLM.from_config(tiny_config("mamba"), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"hidden state stays torch\.float32, and its unembedding is .*--precision fp32"):
        MTPModel(base, HeadsConfig(horizon=2), seed=0)


def test_a_model_without_an_unembedding_is_refused():
    with pytest.raises(ConfigError, match="LlamaModel cannot get multi-token heads"):
        MTPModel(make("llama").model, HeadsConfig(), seed=0)


def test_logits_that_are_not_understood_are_refused():
    base = make("llama")
    base.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(ConfigError, match="logits are not, bit for bit, those of its last hidden state"):
        MTPModel(base, HeadsConfig(), seed=0)


def test_layers_that_are_not_found_are_refused():
    base = make("llama")
    base.config.num_hidden_layers = 2
    with pytest.raises(ConfigError, match=r"no list of 2 decoder layers \(num_hidden_layers\) was found in LlamaModel"):
        MTPModel(base, HeadsConfig(), seed=0)


def test_an_architecture_that_mixes_documents_works_unpacked_only():
    torch.manual_seed(0)
    base = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2)).eval()
    model = MTPModel(base, HeadsConfig(horizon=2), seed=0)
    ids = tokens(2, 6)
    assert torch.equal(model.logits(model(ids), 1), base(input_ids=ids, use_cache=False).logits)
    with pytest.raises(ConfigError, match=r"set data\.train\.packing = false"):
        model.check_packing()
    with pytest.raises(ConfigError, match=r"set data\.train\.packing = false"):
        model(ids, torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1), True)


def test_an_unembedding_narrower_than_the_layers_is_refused():
    base = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8
        )
    ).eval()
    with pytest.raises(ConfigError, match="its last hidden state is 8 wide, and its layers are not"):
        MTPModel(base, HeadsConfig(), seed=0)


def test_brought_heads_must_be_complete_and_fit():
    loaded = MTPModel(make("llama"), HeadsConfig(horizon=3), seed=0)
    state = dict(loaded.extra_heads.state_dict())
    del state["0.mlp.up_proj.weight"]
    state["1.mlp.gate_proj.weight"] = torch.zeros(2, 2)
    state["7.bias"] = torch.zeros(1)
    with pytest.raises(WMTPError) as caught:
        MTPModel(make("llama"), HeadsConfig(horizon=3), head_state=state, seed=0)
    message = str(caught.value)
    assert "0.mlp.up_proj.weight is missing" in message
    assert "1.mlp.gate_proj.weight has shape [2, 2] in place of [48, 32]" in message
    assert "7.bias is unexpected" in message


class TestWantedAndBrought:
    def loaded(self, kind: str = "block", horizon: int = 3) -> LoadedModel:
        model = MTPModel(make("llama"), HeadsConfig(horizon=horizon, kind=kind, init="random"), seed=3)
        return LoadedModel(model=model.base, heads=model.heads, head_state=model.extra_heads.state_dict())

    def test_nothing_wanted_takes_what_is_there(self):
        model = build_model(self.loaded(), None, seed=0)
        assert model.horizon == 3
        assert build_model(LoadedModel(model=make("llama")), None, seed=0).horizon == 1

    def test_fewer_wanted_takes_the_first(self):
        loaded = self.loaded()
        assert loaded.head_state is not None
        model = build_model(loaded, HeadsConfig(horizon=2, decay=0.5), seed=0)
        assert model.heads.decay == 0.5
        assert set(model.extra_heads.state_dict()) == {n for n in loaded.head_state if n.startswith("0.")}
        assert all(torch.equal(tensor, loaded.head_state[n]) for n, tensor in model.extra_heads.state_dict().items())

    def test_more_wanted_is_an_error(self):
        with pytest.raises(ConfigError, match=r"models\.base\.heads\.horizon: the config says 4, .* 3 tokens"):
            build_model(self.loaded(), HeadsConfig(horizon=4), seed=0)

    def test_a_shared_head_reaches_any_horizon(self):
        assert build_model(self.loaded("shared"), HeadsConfig(horizon=5, kind="shared"), seed=0).horizon == 5

    def test_another_kind_is_an_error(self):
        with pytest.raises(ConfigError, match=r"models\.base\.heads\.kind: the config says 'block', .* 'linear'"):
            build_model(self.loaded("linear"), HeadsConfig(horizon=3, kind="block"), seed=0)

    def test_no_kind_is_that_of_the_model(self):
        assert build_model(self.loaded("linear"), HeadsConfig(horizon=3), seed=0).heads.kind == "linear"

    def test_heads_that_were_fed_in_another_way_are_an_error(self, tmp_path: Path):
        """A folder that says no layout is older than these, and its heads read what ``plain`` heads read."""
        MTPModel(make("llama"), HeadsConfig(horizon=2, kind="shared", layout="plain"), seed=0).save_pretrained(tmp_path)
        file = tmp_path / HEADS_CONFIG
        content = json.loads(file.read_text())
        assert content.pop("layout") == "plain"
        file.write_text(json.dumps(content))
        loaded = HfLoader().load(tmp_path, dtype=torch.float32, seed=0)
        with pytest.raises(ConfigError, match=r'heads\.layout: .* were trained as \'plain\'; write layout = "plain"'):
            build_model(loaded, HeadsConfig(horizon=2, layout="mimo"), seed=0)
        assert build_model(loaded, HeadsConfig(horizon=2, layout="plain"), seed=0).heads.kind == "shared"
        for unsaid in (HeadsConfig(horizon=2), None):
            assert build_model(loaded, unsaid, seed=0).heads.layout == "plain"
