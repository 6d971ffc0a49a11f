"""Adapters in a model: what learns, with which gradient, and what is written and read."""

import json
import math

import pytest
import torch
from attrs import evolve
from native_folders import native_folder
from one_step import SMALL, ByPrediction, HardHalf, gradients, make_batch, reference
from torch import nn

from wmtp.checkpoints.local import Checkpoint, load_checkpoint, save_checkpoint
from wmtp.config.schema import DevicesConfig, HeadsConfig, LoraConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.models.acceleration import accelerate
from wmtp.models.adapter_folder import name_base
from wmtp.models.adapters import adapter_off, is_adapter_name, quantize_base
from wmtp.models.build import build_model, merge_brought
from wmtp.models.loaders.hf import HfLoader
from wmtp.models.mtp import StartModel
from wmtp.models.opening import load_model, saved_precision
from wmtp.models.quantized import Linear4Bit, dequantize_layers
from wmtp.optim.config import AdamW
from wmtp.optim.master_weights import MasterWeights
from wmtp.trainers import Stage
from wmtp.training.stages import apply_stage

peft = pytest.importorskip("peft")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("models") / "base"
    SMALL.build().load(None, dtype=torch.float32, seed=1).model.save_pretrained(folder)
    return folder


def make(base, *, lora=None, dtype=torch.float32, moved=True, **heads):
    """A model with an adapter that is away from its start, where it would change nothing."""
    loaded = HfLoader().load(base, dtype=torch.float32, seed=0)
    heads = HeadsConfig(**{"horizon": 3, "init": "random"} | heads)
    model = build_model(loaded, heads, 5, lora=lora or LoraConfig(rank=2), name=name_base(str(base), base)).to(dtype).eval()
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.2)
    return model


def plain_twin(base, model, lora):
    """The same model with W + s·B·A in the place of each adapted weight, by torch alone, and the leaves A and B."""
    heads = evolve(model.heads)
    twin = build_model(HfLoader().load(base, dtype=torch.float32, seed=0), heads, 5).double().eval()
    adapter = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if "lora_" in name}
    scale = lora.resolved_alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
    for name, module in list(twin.named_modules()):
        if (a := adapter.get(f"{name}.lora_A.default.weight")) is not None:
            weight = module.weight.detach() + scale * adapter[f"{name}.lora_B.default.weight"] @ a
            if lora.dora:  # the norm is taken as a constant (arXiv 2402.09353, §4.3)
                length = adapter[f"{name}.lora_magnitude_vector.default.weight"]
                weight = weight * (length / weight.norm(dim=1).detach())[:, None]
            del module._parameters["weight"]
            module.weight = weight
    return twin, adapter


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


@pytest.mark.parametrize("heads", ["full", "adapters"])
def test_only_what_learns_has_a_copy_in_fp32_and_is_in_a_checkpoint(base, tmp_path, heads):
    from safetensors import safe_open

    lora = LoraConfig(rank=2, heads=heads)
    model = make(base, lora=lora, init="copy")
    for parameter in model.fixed_parameters():
        parameter.data = parameter.data.bfloat16()
    masters = MasterWeights(model, fixed=model.fixed_parameters())
    fixed = {id(p) for p in model.fixed_parameters()}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in fixed]
    copies = masters.replace([p for _, p in named])
    assert len(masters._masters) == len(named)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in copies} == {torch.float32}
    optimizer = AdamW(lr=1e-3).build(list(zip([name for name, _ in named], copies, strict=True)))
    with masters.in_place():
        save_checkpoint(tmp_path, 1, model, optimizer, {})
    (file,) = (tmp_path / "step-1").glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        assert set(tensors.keys()) == {f"model.{name}" for name, _ in named}
        expected = {name: tensors.get_tensor(f"model.{name}") for name, _ in named}
    other = make(base, lora=lora, init="copy", moved=False)
    learned = dict(other.named_parameters())
    optimizer = AdamW(lr=1e-3).build([(name, learned[name]) for name, _ in named])
    load_checkpoint(Checkpoint(path=tmp_path / "step-1", step=1), other, optimizer)
    assert all(torch.equal(learned[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "lora",
    [{}, {"dora": True}, {"rslora": True, "targets": ("v_proj",)}, {"heads": "adapters", "dora": True}],
    ids=["lora", "dora", "rslora", "heads"],
)
def test_peft_opens_what_is_saved_and_so_does_wmtp(base, tmp_path, lora):
    from transformers import AutoModelForCausalLM

    model = make(base, lora=LoraConfig(rank=2, **lora), init="copy")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again, opened = load_model(tmp_path), peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(IDS)
        logits = model.logits(expected, 1)
        assert torch.equal(opened(input_ids=IDS).logits, logits)
        assert all(torch.equal(left, right) for left, right in zip(again(IDS).hidden, expected.hidden, strict=True))
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=IDS).logits
        assert (plain - logits).abs().max() > 1e-3
        with adapter_off(again):
            assert torch.equal(again.logits(again(IDS), 1), plain)
        assert torch.equal(again.logits(again(IDS), 1), logits), "the adapter is on again"
        again.merge_adapter()
        torch.testing.assert_close(again(IDS).hidden, expected.hidden)
    assert {type(module).__module__.split(".")[0] for module in again.modules()} <= {"torch", "transformers", "wmtp"}
    again.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=IDS).logits
        assert torch.equal(plain, again.logits(again(IDS), 1))


def test_bf16_parameters_are_opened_as_they_were_saved(base, tmp_path):
    model = make(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert saved_precision(tmp_path) == "bf16-params"
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again(IDS).hidden[2], model(IDS).hidden[2])


def test_an_adapter_that_peft_wrote_goes_on_or_is_merged(base, tmp_path):
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.1
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).eval()
    theirs.save_pretrained(tmp_path)
    logits = theirs(input_ids=IDS).logits
    wanted = LoraConfig(rank=2, alpha=4.0, targets=("v_proj", "q_proj"))
    model = build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), HeadsConfig(horizon=2), 0, lora=wanted)
    assert torch.equal(model.logits(model(IDS), 1), logits)
    merged = build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), None, 0)
    merge_brought(merged)
    assert merged.adapter is None
    assert all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged.logits(merged(IDS), 1), logits)
    with pytest.raises(ConfigError) as error:
        build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), None, 0, lora=LoraConfig(rank=3, dora=True))
    found = [problem.split(":")[0] for problem in error.value.problems]
    assert found == [f"models.base.lora.{key}" for key in ("rank", "alpha", "dora", "targets")]


def test_the_base_is_found_or_asked_for_and_another_is_refused(base, tmp_path):
    make(base).save_pretrained(tmp_path / "adapter")
    other = tmp_path / "other"
    SMALL.build().load(None, dtype=torch.float32, seed=2).model.save_pretrained(other)
    with pytest.raises(WMTPError, match=r"trained on another model than .*other.*: models\.base\.base_uri"):
        HfLoader(base_uri=str(other)).load(tmp_path / "adapter", dtype=torch.float32, seed=0)
    file, own = tmp_path / "adapter/adapter_config.json", tmp_path / "adapter/wmtp_adapter.json"
    content = json.loads(file.read_text())
    assert content["base_model_name_or_path"] == str(base.resolve())
    own.unlink()
    for name, said in (("../gone", "no such file or folder"), (None, "names no base_model_name_or_path")):
        file.write_text(json.dumps(content | {"base_model_name_or_path": name}))
        with pytest.raises(ConfigError, match=rf"its base is not found: .*{said}.*models\.base\.base_uri"):
            HfLoader().info(tmp_path / "adapter")
        assert HfLoader(base_uri=str(base)).info(tmp_path / "adapter").heads == HeadsConfig(kind="block", horizon=3)
    file.write_text(json.dumps(content | {"base_model_name_or_path": "../other"}))  # beside it
    assert HfLoader().load(tmp_path / "adapter", dtype=torch.float32, seed=0).adapter.fingerprint is None
    with pytest.raises(ConfigError, match=r"base_uri: has no effect"):
        HfLoader(base_uri=str(base)).info(base)
    wide = evolve(SMALL, hidden_size=32).build().load(None, dtype=torch.float32, seed=2).model
    wide.save_pretrained(other)
    make(base, horizon=1).save_pretrained(tmp_path / "adapter")
    own.unlink()
    file.write_text(json.dumps(content | {"base_model_name_or_path": "../other"}))
    with pytest.raises(WMTPError, match=r"do not fit its base: .* has shape \[2, 16\] in place of \[2, 32\]"):
        load_model(tmp_path / "adapter")


def test_what_is_no_adapter_of_lora_is_refused(base, tmp_path):
    make(base).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for change, said in (
        ({"peft_type": "IA3"}, "of type IA3, and WMTP opens LORA"),
        ({"modules_to_save": ["lm_head"]}, "changes more than LoRA's matrices"),
        ({"bias": "all"}, "changes more than LoRA's matrices"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(WMTPError, match=said):
            HfLoader().info(tmp_path)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("q_prj",), r"targets\.0: 'q_prj' is no linear map of this model; did you mean 'q_proj'\?"),
        (("q_proj", "xyz"), r"targets\.1: 'xyz' .*there are: down_proj, gate_proj, k_proj"),
        (("mlp",), r"means model\.layers\.0\.mlp \(LlamaMLP\), which is no linear map"),
        (("lm_head",), r"'lm_head' is the unembedding, which all heads share; it stays as it is"),
        (("embed_tokens",), r"means model\.embed_tokens \(Embedding\), which is no linear map"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_the_names_there_are(base, targets, said):
    with pytest.raises(ConfigError, match=said):
        make(base, lora=LoraConfig(rank=2, targets=targets))


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


@pytest.mark.parametrize("heads", ["full", "adapters"])
def test_a_models_own_layers_for_multi_token_prediction_learn_beside_an_adapter(tmp_path, heads):
    """They are in the adapter's folder, for want of the model's; merged, they go back to their place."""
    from safetensors.torch import load_file

    base = native_folder(tmp_path / "base", "mimo")
    loaded = HfLoader().load(base, dtype=torch.float32, seed=0)
    model = build_model(loaded, None, 0, lora=LoraConfig(rank=2, heads=heads), name=name_base(str(base), base)).eval()
    assert model.heads.kind == "native"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (heads == "full" and name.startswith("extra_heads.")):
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    with torch.no_grad():
        assert all(torch.equal(left, right) for left, right in zip(again(IDS).hidden, model(IDS).hidden, strict=True))
        again.merge_adapter()
        again.save_pretrained(tmp_path / "merged")
        merged = load_model(tmp_path / "merged")
        assert merged.heads.kind == "native"
        assert all(torch.equal(left, right) for left, right in zip(merged(IDS).hidden, again(IDS).hidden, strict=True))
    names = {name for file in base.glob("*.safetensors") for name in load_file(file)}
    assert {name for file in (tmp_path / "merged").glob("model*.safetensors") for name in load_file(file)} == names


# --- a base in 4 bits


def quantized(base, *, dtype=torch.float32, **heads):
    pytest.importorskip("bitsandbytes")
    model = make(base, dtype=dtype, **heads)
    model.adapter = evolve(model.adapter, quantize="nf4")
    quantize_base(model)
    return model


def test_gradients_on_4_bits_are_those_of_what_the_4_bits_say(base):
    """Against plain autograd over the weights that are left, in float64; heads 2..H are copies of the whole weights."""
    model, lora = quantized(base, dtype=torch.float64, init="copy"), LoraConfig(rank=2)
    assert sum(isinstance(module, Linear4Bit) for module in model.modules()) == 2 * 7
    apply_stage(Stage(), model, {}, "mine")
    batch = make_batch(packed=False)
    _, found = gradients(model, ByPrediction(), batch, micro=2)
    left = {name: m.weight for name, m in model.base.named_modules() if isinstance(m, Linear4Bit)}
    dequantize_layers(model.base)
    assert all(torch.equal(model.base.get_submodule(name).weight, weight) for name, weight in left.items())
    apply_stage(Stage(), model, {}, "mine")
    _, expected = gradients(model, ByPrediction(), batch, micro=2)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)
    twin, adapter = plain_twin(base, model, lora)
    for name, weight in left.items():
        plain = twin.base.get_submodule(name.removesuffix(".base_layer"))
        whole = HfLoader().load(base, dtype=torch.float64, seed=0).model.get_submodule(name.removesuffix(".base_layer"))
        plain.weight = plain.weight + (weight - whole.weight).detach()
    twin.extra_heads.load_state_dict(model.extra_heads.state_dict())
    reference(twin, batch, lambda b, t, k, id: float(id % 4 + k), [1.0, 1.0, 1.0]).backward()
    for name, leaf in adapter.items():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-6, atol=1e-8)


def test_adapted_heads_go_on_under_the_same_settings_or_learn_whole(base, tmp_path):
    lora = LoraConfig(rank=2, heads="adapters")
    model = make(base, lora=lora, init="copy")
    model.save_pretrained(tmp_path)
    loaded = HfLoader().load(tmp_path, dtype=torch.float32, seed=0)
    goes_on = build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), None, 0, lora=lora)
    assert goes_on.learned_state().keys() == model.learned_state().keys()
    with pytest.raises(ConfigError, match=r"models\.base\.lora\.heads: 'full', but the adapter in .* has 'adapters'"):
        build_model(HfLoader().load(tmp_path, dtype=torch.float32, seed=0), None, 0, lora=LoraConfig(rank=2))
    whole = build_model(loaded, None, 0)
    merge_brought(whole)
    assert whole.adapter is None
    assert not whole.fixed_parameters()
    torch.testing.assert_close(whole(IDS).hidden, model(IDS).hidden)


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


def test_a_base_in_4_bits_is_opened_and_merged_as_it_was_learned_on(base, tmp_path):
    model = quantized(base)
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(tmp_path / "adapter")
    with torch.no_grad():
        assert all(torch.equal(left, right) for left, right in zip(again(IDS).hidden, model(IDS).hidden, strict=True))
        again.merge_adapter()
        again.save_pretrained(tmp_path / "merged")
        merged = load_model(tmp_path / "merged")
        torch.testing.assert_close(merged(IDS).hidden[0], model(IDS).hidden[0], rtol=1e-5, atol=1e-5)
    whole = build_model(HfLoader().load(tmp_path / "adapter", dtype=torch.float32, seed=0), None, 0)
    merge_brought(whole)
    assert torch.equal(whole.logits(whole(IDS), 1), merged.logits(merged(IDS), 1))
    loaded = HfLoader().load(tmp_path / "adapter", dtype=torch.float32, seed=0)
    with pytest.raises(ConfigError, match=r'models\.base\.quantize: no quantize, but the adapter was learned with "nf4"'):
        build_model(loaded, None, 0, lora=LoraConfig(rank=2))


def test_4_bits_are_those_of_bitsandbytes_and_follow_autocast():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(96, 40)
    made = Linear4Bit.of(linear, torch.device("cpu"))
    theirs = bitsandbytes.functional.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
    assert torch.equal(made.weight, bitsandbytes.functional.dequantize_4bit(*theirs))
    x = torch.randn(2, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), nn.functional.linear(x, made.weight) + linear.bias.bfloat16())
    assert not made.state_dict().keys() - {"bias"}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_no_weight_of_4_bits_is_kept_in_full_between_the_passes(compiled):
    """A compiler that sees the weight made twice keeps it: 17 GiB of a 7B model."""
    pytest.importorskip("bitsandbytes")
    size = 256
    maps = [Linear4Bit.of(nn.Linear(size, size, bias=False), torch.device("cpu")) for _ in range(2)]
    run = nn.Sequential(maps[0], nn.SiLU(), maps[1]).forward
    x, kept = torch.randn(4, size, requires_grad=True), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (torch.compile(run) if compiled else run)(x).sum().backward()
    assert sum(kept.values()) < 1.2 * size * size
    plain = nn.functional.silu(x @ maps[0].weight.T) @ maps[1].weight.T
    torch.testing.assert_close(torch.autograd.grad(plain.sum(), x)[0], x.grad)
