"""The memory estimate against what was measured, and what it must depend on."""

import pytest
from attrs import evolve

from wmtp.config.load import load_config
from wmtp.config.schema import DevicesConfig, Fp8Config, FsdpConfig, HeadsConfig, LoraConfig, ModelConfig
from wmtp.errors import WMTPError
from wmtp.models.build import build_model
from wmtp.models.config import HfModel, ScratchModel
from wmtp.models.outline import outline
from wmtp.training.memory import cheaper_settings, estimate_memory, explain_out_of_memory, head_parameters
from wmtp_algos import Rho1WMTP

ONE_BILLION = ScratchModel(
    vocab_size=1024, hidden_size=2048, layers=16, attention_heads=32, kv_heads=8, intermediate_size=8192, max_positions=2048
)


def config(**train):
    return load_config(
        {
            "models": {"base": {"type": "scratch", "vocab_size": 1024}},
            "tokenizer": {"type": "bytes"},
            "datasets": {"code": {"type": "python-source"}},
            "data": {"train": {"max_length": 2048, "batch_size": 16, "micro_batch_size": 4} | train},
            "trainer": {"type": "baseline-mtp"},
            "devices": {"precision": "bf16"},
        }
    )


def test_it_is_near_what_a_run_on_an_h100_took():
    """Measured: 40.8 GiB at the peak (torch 2.11, bf16 autocast, four rows of 2,048 tokens at once, AdamW)."""
    estimate = estimate_memory(config(), ONE_BILLION.build().info(None), HeadsConfig(horizon=4))
    assert estimate.total / 2**30 == pytest.approx(40.8, rel=0.1)


@pytest.mark.parametrize(
    ("vocab", "devices", "measured"),
    [
        (32_000, {"compile": True}, 62.6),
        (128_256, {"compile": True}, 68.6),
    ],
)
def test_it_is_near_what_runs_on_an_h200_took(vocab, devices, measured):
    """bench/step.py on torch 2.11: bf16-params, 16 rows of 2,048 tokens at once."""
    wanted = config(batch_size=16, micro_batch_size=16)
    wanted = evolve(wanted, devices=DevicesConfig(precision="bf16-params", **devices))
    info = evolve(ONE_BILLION, vocab_size=vocab).build().info(None)
    assert estimate_memory(wanted, info, HeadsConfig(horizon=4)).total / 2**30 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("quantize", "mode", "batch", "measured"),
    [
        (None, "none", 2, 39.2),
        (None, "selective", 2, 34.2),
        ("fp8", "none", 2, 32.7),
        ("fp8", "selective", 2, 28.2),
        ("nf4", "selective", 2, 25.5),
        ("nf4", "selective", 1, 19.6),
        ("nf4", "full", 4, 17.5),
    ],
)
def test_it_is_near_what_adapters_on_a_7b_shape_took_on_an_h200(quantize, mode, batch, measured):
    """bench/lora.py: four block heads that learn in full, rank 16 on every linear map, rows of 2,048, compiled."""
    shape = ScratchModel(vocab_size=32_000, hidden_size=4096, layers=32, attention_heads=32, intermediate_size=11_008)
    info = outline(shape)
    assert info is not None
    precision = "fp8" if quantize == "fp8" else "bf16-params"
    lora = ModelConfig(loader=HfModel(uri="x"), lora=LoraConfig(rank=16), quantize="nf4" if quantize == "nf4" else None)
    devices = DevicesConfig(device="cuda", precision=precision, compile=True, activation_checkpointing=mode)
    wanted = evolve(config(batch_size=batch, micro_batch_size=batch), models={"base": lora}, devices=devices)
    assert estimate_memory(wanted, info, HeadsConfig(horizon=4)).total / 2**30 == pytest.approx(measured, rel=0.08)


def test_inputs_of_layers_wait_on_the_host():
    info, heads = ONE_BILLION.build().info(None), HeadsConfig(horizon=4)
    wanted = config(max_length=2048, batch_size=4)
    full, offload = (
        estimate_memory(
            evolve(wanted, devices=DevicesConfig(precision="bf16-params", activation_checkpointing=mode)), info, heads
        )
        for mode in ("full", "offload")
    )
    assert offload.host == 15 * 4 * 2048 * 2048 * 2, "of 16 layers all but head 1's"
    assert full.activations - offload.activations == offload.host * 14 / 15, "one is on its way"
    assert str(offload).endswith("; 480.0 MiB of activations on the host")
    assert "host" not in str(full)


def test_a_hybrid_run_divides_by_the_processes_of_a_machine():
    info, heads = ONE_BILLION.build().info(None), HeadsConfig(horizon=4)

    def kept(strategy, world_size, per_machine):
        wanted = evolve(config(), devices=DevicesConfig(precision="bf16", fsdp=FsdpConfig(strategy=strategy)))
        return estimate_memory(wanted, info, heads, world_size=world_size, per_machine=per_machine).optimizer

    assert kept("hybrid", 16, 8) == kept("full", 8, 8) == 2 * kept("full", 16, 8)
    wanted = evolve(config(), devices=DevicesConfig(precision="bf16", fsdp=FsdpConfig(strategy="hybrid")))
    named = [setting for setting, _ in cheaper_settings(wanted, info, heads, world_size=64, per_machine=2)]
    assert 'devices.fsdp.strategy = "full"' in named


def test_it_is_near_what_a_run_in_fp8_took():
    """The same in fp8, all linear maps, one scale a tensor: 56.5 GiB."""
    wanted = config(batch_size=16, micro_batch_size=16)
    info, heads = evolve(ONE_BILLION, vocab_size=32_000).build().info(None), HeadsConfig(horizon=4)

    def gib(**fp8):
        devices = DevicesConfig(precision="fp8", compile=True, fp8=Fp8Config(**fp8))
        return estimate_memory(evolve(wanted, devices=devices), info, heads).total / 2**30

    assert gib() == pytest.approx(56.5, rel=0.06)
    assert gib(recipe="rowwise") == pytest.approx(49.9, rel=0.06)
    table = 32_000 * 2048 / 2**30
    assert gib(logits="forward") - gib() == pytest.approx(table)
    assert gib(logits="hidden-gradient") - gib() == pytest.approx(2 * table + 0.25)
    half = DevicesConfig(precision="bf16-params", compile=True)
    assert gib(recipe="rowwise-gw-hp") == estimate_memory(evolve(wanted, devices=half), info, heads).total / 2**30


def test_an_objective_of_the_heads_holds_two_models_distributions():
    info = evolve(ONE_BILLION, vocab_size=128_256).build().info(None)
    plain, agreeing, alone = (
        estimate_memory(config(), info, HeadsConfig(**heads)).loss
        for heads in ({}, {"objective": "kl"}, {"objective": "kl", "horizon": 1})
    )
    assert agreeing - plain == 1.5 * 2**30
    assert alone < plain


def test_it_depends_on_the_micro_batch_and_not_on_the_batch():
    info, heads = ONE_BILLION.build().info(None), HeadsConfig(horizon=4)
    whole = estimate_memory(config(), info, heads)
    assert estimate_memory(config(batch_size=64), info, heads) == whole
    assert estimate_memory(config(micro_batch_size=2), info, heads).activations == whole.activations // 2
    rows = config(batch_size=64, micro_batch_size=None)
    assert estimate_memory(rows, info, heads, world_size=4).activations == 4 * whole.activations
    assert estimate_memory(config(), info, evolve(heads, horizon=1)).parameters < whole.parameters


def with_devices(**devices):
    return evolve(config(), devices=DevicesConfig(**devices))


def test_processes_share_parameters_gradients_and_optimizer_unless_they_hold_all():
    info, heads = ONE_BILLION.build().info(None), HeadsConfig(horizon=4)

    def estimate(fsdp=None, **job):
        wanted = evolve(config(batch_size=64), devices=DevicesConfig(fsdp=fsdp))
        return estimate_memory(wanted, info, heads, **job)

    one, eight = estimate(), estimate(world_size=8)
    whole = estimate(FsdpConfig(strategy="none"), world_size=8)
    assert eight.optimizer == one.optimizer // 8
    assert eight.gradients == one.gradients // 8
    assert one.parameters / 8 < eight.parameters < one.parameters / 3
    assert (whole.optimizer, whole.gradients, whole.parameters) == (one.optimizer, one.gradients, one.parameters)
    kept = estimate(FsdpConfig(strategy="grad-op"), world_size=8)
    assert eight.parameters < kept.parameters


def test_checkpointing_precision_and_compiling_order_the_activations():
    info, heads = ONE_BILLION.build().info(None), HeadsConfig(horizon=4)

    def activations(**devices):
        return estimate_memory(with_devices(**devices), info, heads).activations

    for compile_ in (False, True):
        modes = [activations(compile=compile_, activation_checkpointing=mode) for mode in ("full", "selective", "none")]
        assert modes == sorted(modes)
    assert activations(precision="bf16-params") < activations(precision="bf16") < activations(precision="fp32")
    assert activations(compile=True) < activations()


def test_other_models_count_where_they_compute():
    info, heads = ONE_BILLION.build().info(None), HeadsConfig(horizon=4)

    def other(**trainer):
        wanted = evolve(config(), trainer=Rho1WMTP(**trainer))
        return estimate_memory(wanted, info, heads, others={"ref": info}).other_models

    assert other() == 4 * info.parameters
    assert other(reference_precision="bf16") == 2 * info.parameters
    assert other(reference_device="cpu") == 0


def test_settings_that_help_are_named_with_what_they_give():
    info, heads = ONE_BILLION.build().info(None), HeadsConfig(horizon=4)
    now = estimate_memory(config(), info, heads).total
    settings = cheaper_settings(config(), info, heads)
    assert len(settings) == 3
    totals = [total for _, total in settings]
    assert totals == sorted(totals)
    assert totals[-1] < now
    keys = [setting.partition(" = ")[0] for setting, _ in settings]
    assert len(set(keys)) == 3
    assert "devices.activation_checkpointing" in keys
    smallest = evolve(config(batch_size=1, micro_batch_size=1, max_length=2), devices=DevicesConfig(compile=True))
    assert all("micro_batch" not in setting for setting, _ in cheaper_settings(smallest, info, heads))


def test_a_device_without_memory_is_a_clear_error():
    import torch

    info, heads = ONE_BILLION.build().info(None), HeadsConfig(horizon=4)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ):
        with (
            pytest.raises(WMTPError, match="out of memory: the estimate was about") as caught,
            explain_out_of_memory(config(), info, heads, device="cuda:0"),
        ):
            raise error
        message = str(caught.value)
        assert message.startswith("cuda:0 is out of memory")
        assert message.count("(about ") == 3
        assert "\n" not in message
    with pytest.raises(WMTPError, match="out of memory"), explain_out_of_memory(config(), info, heads, device="cpu"):
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(config(), info, heads, device="cpu"):
        raise RuntimeError("another mistake")


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"kv_heads": 2}),
        ("llama", {"tie_embeddings": True}),
        ("qwen3", {"options": {"head_dim": 32}}),
        ("mistral", {}),
        ("gemma", {"options": {"head_dim": 16}}),
        ("olmo2", {}),
    ],
)
def test_the_outline_without_torch_is_that_of_the_real_model(architecture, options, tmp_path):
    shape = ScratchModel(
        architecture=architecture, vocab_size=500, hidden_size=128, layers=3, attention_heads=8, intermediate_size=256,
        max_positions=64, **options,
    )  # fmt: skip
    real, found = shape.build().info(None), outline(shape)
    assert found is not None
    assert found.parameters == pytest.approx(real.parameters, rel=0.01)
    assert found.layer_parameters == pytest.approx(real.layer_parameters, rel=0.01)
    for name in ("layers", "hidden_size", "vocab_size", "feed_forward_size", "kv_size"):
        assert getattr(found, name) == getattr(real, name), name
    assert set(found.linear_maps) == set(real.linear_maps)
    config_json = shape.build()._config().to_json_string()
    (tmp_path / "config.json").write_text(config_json)
    assert outline(HfModel(uri=str(tmp_path))) == evolve(found, architecture=architecture)


def test_there_is_no_outline_of_what_cannot_be_told(tmp_path):
    assert outline(ScratchModel(architecture="gpt2", vocab_size=50)) is None
    assert outline(HfModel(uri="s3://bucket/model")) is None
    assert outline(HfModel(uri=str(tmp_path))) is None
    (tmp_path / "config.json").write_text("{")
    assert outline(HfModel(uri=str(tmp_path))) is None


@pytest.mark.parametrize("kind", ["block", "linear", "residual", "chained", "shared"])
@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_head_parameters_are_those_of_the_real_heads(kind, horizon):
    import torch

    small = ScratchModel(vocab_size=50, hidden_size=64, layers=2, attention_heads=2, intermediate_size=96)
    heads = HeadsConfig(horizon=horizon, kind=kind)
    model = build_model(small.build().load(None, dtype=torch.float32, seed=0), heads, 0)
    real = sum(parameter.numel() for parameter in model.extra_heads.parameters())
    assert head_parameters(small.build().info(None), heads) == pytest.approx(real, rel=0.02)
