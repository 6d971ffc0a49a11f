"""Adapters in a model: trainable parameters and their gradients."""

import pytest
import torch
from adapted import IDS, make, plain_twin
from attrs import evolve
from one_step import SMALL, ByPrediction, HardHalf, gradients, make_batch, reference
from torch import nn

from wmtp.config.schema import DevicesConfig, LoraConfig
from wmtp.errors import ConfigError
from wmtp.models.acceleration import accelerate
from wmtp.models.adapter_names import is_adapter_name
from wmtp.models.adapter_targets import make_peft_config
from wmtp.models.build import build_model
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.start_model import StartModel
from wmtp.trainers import Stage
from wmtp.training.stages import apply_stage

pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("lora", "heads"),
    [
        ({}, {}),
        ({"targets": ("q_proj", "down_proj"), "alpha": 3.0}, {"kind": "linear"}),
        ({"rslora": True}, {"kind": "chained", "trunk_gradient": "detach"}),
        ({"dora": True}, {"kind": "shared"}),
        ({"dora": True, "heads": "adapters"}, {"init": "copy"}),
        ({"targets": ("q_proj", "down_proj"), "heads": "adapters"}, {"init": "copy", "trunk_gradient": "detach"}),
    ],
    ids=["block", "some-linear", "rslora-chained-detach", "dora-shared", "dora-heads", "some-heads-detach"],
)
def test_gradients_are_those_of_the_merged_weights(base, lora, heads):
    """Against plain autograd over W + s·B·A, in float64, over micro-batches and packed rows."""
    lora = LoraConfig(rank=2, **lora)
    model = make(base, lora=lora, dtype=torch.float64, **heads)
    apply_stage(Stage(), model, {}, "mine")
    batch = make_batch(packed=True)
    _, found = gradients(model, ByPrediction(), batch, micro=2)
    twin, adapter = plain_twin(base, model, lora)
    reference(twin, batch, lambda b, t, k, id: float(id % 4 + k), [1.0, 1.0, 1.0]).backward()
    expected = {name: p.grad for name, p in adapter.items()}
    if lora.heads == "full":
        expected |= {name: p.grad for name, p in twin.named_parameters() if name.startswith("extra_heads.")}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert any(found[name].abs().max() > 1e-3 for name in adapter)


def test_micro_batches_change_nothing_where_weights_need_the_losses(base):
    model = make(base, dtype=torch.float64)
    apply_stage(Stage(), model, {}, "mine")
    whole, split = (gradients(model, HardHalf(), make_batch(packed=False), micro=size)[1] for size in (99, 2))
    assert whole.keys() == split.keys()
    assert all(torch.allclose(whole[name], split[name], rtol=1e-9, atol=1e-12) for name in whole)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "compiled"])
def test_accelerated_layers_have_the_same_gradients_in_every_stage(base, mode, compiled, without_the_compiler):
    if mode == "none" and not compiled:
        pytest.skip("that is what the others are compared with")
    batch = make_batch(packed=False)
    plain, fast = make(base, dtype=torch.float64), make(base, dtype=torch.float64)
    accelerate(fast, DevicesConfig(compile=compiled, activation_checkpointing=mode))
    for frozen in ({"model"}, set(), {"heads"}):
        stage = Stage(frozen=frozenset(frozen))
        found = []
        for model in (plain, fast):
            apply_stage(stage, model, {}, "mine")
            found.append(gradients(model, ByPrediction(), batch, micro=2, stage=stage)[1])
        assert found[0].keys() == found[1].keys()
        assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-6, atol=1e-10) for name in found[0])


def test_a_model_is_its_own_start_model_while_it_learns(base):
    model = make(base)
    start, plain = StartModel(model), build_model(HfLoader().load(base, dtype=torch.float32, seed=0), None, 0).eval()
    apply_stage(Stage(), model, {}, "mine")
    trunk = model(IDS)
    with torch.no_grad():
        assert torch.equal(start.logits(start(IDS), 1), plain.logits(plain(IDS), 1))
    assert (start.horizon, model.horizon) == (1, 3)
    trunk.hidden[0].sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name and ".layers." in name)
    assert torch.equal(model(IDS).hidden[2], trunk.hidden[2])


def test_a_new_adapter_changes_nothing_and_the_seed_makes_it(base):
    plain = build_model(HfLoader().load(base, dtype=torch.float32, seed=0), None, 5).eval()
    state = torch.get_rng_state()
    one, other = make(base, moved=False), make(base, moved=False)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(one(IDS).hidden[0], plain(IDS).hidden[0])
    left, right = one.state_dict(), other.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("in_heads", [False, True])
def test_stages_free_the_adapter_and_never_the_base(base, in_heads):
    model = make(base, lora=LoraConfig(rank=2, heads="adapters" if in_heads else "full"), init="copy")
    for stage, expected in (
        (Stage(), {"adapter", "heads"}),
        (Stage(frozen=frozenset({"model"})), {"heads"}),
        (Stage(frozen=frozenset({"heads"})), {"adapter"}),
    ):
        apply_stage(stage, model, {}, "mine")
        learns = {name for name, p in model.named_parameters() if p.requires_grad}
        kinds = {"heads" if n.startswith("extra_heads.") else "adapter" if is_adapter_name(n) else "base" for n in learns}
        assert kinds == expected
        assert not in_heads or all(map(is_adapter_name, learns))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("q_prj",), r"targets\.0: 'q_prj' is no linear map of this model; did you mean 'q_proj'\?"),
        (("q_proj", "xyz"), r"targets\.1: 'xyz' .*there are: down_proj, gate_proj, k_proj"),
        (("mlp",), r"means model\.layers\.0\.mlp \(LlamaMLP\), which is no linear map"),
        (("lm_head",), r"'lm_head' is the unembedding, which all heads share; it stays as it is"),
        (("embed_tokens",), r"means model\.embed_tokens \(Embedding\), which is no linear map"),
        (("",), r"targets\.0: '' is no linear map of this model; there are: down_proj"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_the_names_there_are(base, targets, said):
    with pytest.raises(ConfigError, match=said):
        make(base, lora=LoraConfig(rank=2, targets=targets))


def test_a_rank_that_no_map_can_have_is_refused(base):
    largest = HfLoader().load(base, dtype=torch.float32, seed=0).model.config.hidden_size
    make(base, lora=LoraConfig(rank=largest))
    with pytest.raises(ConfigError, match=rf"lora\.rank: {largest + 1}, but rank {largest} holds every change of .* lower it"):
        make(base, lora=LoraConfig(rank=largest + 1))


def test_experts_are_said_to_get_no_adapters():
    shape = evolve(SMALL, architecture="mixtral", options={"num_local_experts": 4})
    model = shape.build().load(None, dtype=torch.float32, seed=1).model
    with pytest.raises(ConfigError, match=r"targets\.0: 'gate_up_proj' are weights of experts, .* get no adapters; .* q_proj"):
        make_peft_config(model, LoraConfig(targets=("gate_up_proj",)))


def test_a_tied_unembedding_is_said_to_be_tied():
    loaded = evolve(SMALL, tie_embeddings=True).build().load(None, dtype=torch.float32, seed=1)
    with pytest.raises(ConfigError, match="is the embedding too: they are tied"):
        build_model(loaded, None, 0, lora=LoraConfig(targets=("lm_head",)))


def test_every_layer_of_an_older_architecture_is_adapted():
    """GPT-2's maps are no `nn.Linear`, and have the input first."""
    shape = evolve(SMALL, architecture="gpt2", intermediate_size=None)
    model = build_model(shape.build().load(None, dtype=torch.float32, seed=1), None, 0, lora=LoraConfig(rank=2)).eval()
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 2 * 4
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
            nn.init.normal_(parameter, std=0.1)
        before = model(IDS).hidden[0]
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).hidden[0], before)


@pytest.mark.parametrize(
    ("targets", "heads", "said"),
    [
        (("model.layers.0.self_attn.q_proj",), {}, r"none of model\.layers\.0\.self_attn\.q_proj is in the heads' layers"),
        ("all-linear", {"init": "random"}, "begin with random layers must learn in full"),
        ("all-linear", {"kind": "shared"}, "are of kind 'shared' must learn in full"),
    ],
)
def test_heads_that_no_adapter_can_teach_are_refused(base, targets, heads, said):
    with pytest.raises(ConfigError, match=rf"models\.base\.lora\.heads: .*{said}"):
        make(base, lora=LoraConfig(rank=2, targets=targets, heads="adapters"), **{"init": "copy"} | heads)
