"""Optimizers, learning-rate groups and schedules."""

import math
from types import SimpleNamespace

import pytest
import torch

from wmtp.checkpoints.local import load_checkpoint, load_checkpoint_weights, save_checkpoint
from wmtp.config.schema import ScheduleConfig
from wmtp.errors import ConfigError, FileError
from wmtp.optim.build import build_optimizer, change_learning_rate
from wmtp.optim.config import AdamW, AdamW8bit, Muon
from wmtp.optim.update import learning_rate_factor


def parameters():
    torch.manual_seed(0)
    shapes = {"embed_tokens.weight": (6, 4), "layers.0.weight": (4, 4), "norm.weight": (4,), "extra_heads.0.weight": (4, 4)}
    named = [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    return named


@pytest.mark.parametrize("config", [AdamW(lr=0.1, weight_decay=0.5), Muon(lr=0.1, weight_decay=0.5)])
def test_every_parameter_is_learned_once_and_only_matrices_decay(config):
    named = parameters()
    optimizer = config.build(named)
    groups = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(i for i, _ in groups) == sorted(id(p) for _, p in named)
    decay = dict(groups)
    assert {name: decay[id(p)] for name, p in named} == {name: 0.0 if name.startswith("norm") else 0.5 for name, _ in named}


def test_adamw_equals_its_definition():
    config = AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    named = parameters()
    before = {name: p.detach().double().clone() for name, p in named}
    optimizer = config.build(named)
    optimizer.step()
    for name, p in named:
        g, old = p.grad.double(), before[name]
        update = g / (g.abs() + 1e-6)  # after one step both corrected means are the gradient itself
        decayed = old * (1 - 0.01 * 0.1) if p.ndim >= 2 else old
        torch.testing.assert_close(p.detach().double(), decayed - 0.01 * update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [AdamW(lr=0.1), Muon(lr=0.1)])
def test_a_resumed_optimizer_goes_on_bit_for_bit(config):
    def run(break_at):
        named = parameters()
        optimizer = config.build(named)
        for step in range(4):
            if step == break_at:
                state = optimizer.state_dict()
                optimizer = config.build(named)
                optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            optimizer.step()
        return [p.detach() for _, p in named]

    for left, right in zip(run(None), run(2), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("config", [AdamW(lr=0.1), Muon(lr=0.1)])
def test_heads_may_learn_faster(config):
    named = parameters()
    optimizer = config.build(named)
    change_learning_rate(optimizer, [p for name, p in named if name.startswith("extra_heads")], lambda lr: 20.0 * lr)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in named} == {
        name: pytest.approx(2.0 if name.startswith("extra_heads") else 0.1) for name, _ in named
    }
    plain, fast = parameters(), parameters()
    optimizers = [config.build(plain), config.build(fast)]
    change_learning_rate(optimizers[1], [fast[-1][1]], lambda lr: 3.0 * lr)
    starts = [p.detach().clone() for _, p in plain]
    for each in optimizers:
        each.step()
    torch.testing.assert_close(fast[-1][1] - starts[-1], 3 * (plain[-1][1] - starts[-1]))
    assert torch.equal(fast[0][1], plain[0][1])


@pytest.mark.parametrize("type_", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 4}, {"warmup_ratio": 0.2}])
def test_schedules_rise_to_one_and_end_where_they_should(type_, warmup):
    config = ScheduleConfig(type=type_, min_ratio=0.1, **warmup)
    factors = [learning_rate_factor(config, step, 20) for step in range(20)]
    rise = 4 if warmup else 0
    assert factors[:rise] == [(step + 1) / 4 for step in range(rise)]
    assert max(factors) == 1.0 == factors[rise]
    assert all(a >= b for a, b in zip(factors[rise:], factors[rise + 1 :], strict=False))
    after_the_last = learning_rate_factor(config, 20, 20)
    assert after_the_last == pytest.approx(1.0 if type_ == "constant" else 0.1)
    assert factors[-1] >= after_the_last
    assert learning_rate_factor(ScheduleConfig(type=type_), 19, 20) > 0, "the last step learns too"
    middle = learning_rate_factor(ScheduleConfig(type="cosine"), 5, 20)
    assert middle == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_a_share_of_the_steps_is_rounded_down_for_the_warm_up():
    schedule = ScheduleConfig(type="constant", warmup_ratio=0.15)
    assert [learning_rate_factor(schedule, step, 19) for step in range(3)] == [0.5, 1.0, 1.0]  # 2.85 steps
    assert learning_rate_factor(schedule, 0, 6) == 1.0  # 0.9 of a step


def test_muon_learns_no_table_of_vectors():
    names = (
        "embed_tokens.weight",
        "wte.weight",
        "wpe.weight",
        "lm_head.weight",
        "extra_heads.unembedding.1.weight",
        "q.weight",
    )
    named = [(name, torch.nn.Parameter(torch.ones(3, 3))) for name in (*names, "layers.0.up.weight")]
    muon, adamw = Muon(lr=0.1).build(named).parts
    kinds = {id(p): type(part) for part in (muon, adamw) for group in part.param_groups for p in group["params"]}
    assert [name for name, p in named if kinds[id(p)] is torch.optim.Muon] == ["q.weight", "layers.0.up.weight"]


def test_heads_learn_with_their_factor_of_the_rate():
    model = SimpleNamespace(extra_heads=torch.nn.Linear(2, 2), heads=SimpleNamespace(lr_factor=3.0))
    trunk, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    config = SimpleNamespace(optimizer=AdamW(lr=0.1))
    named = [*model.extra_heads.named_parameters("heads"), *trunk.named_parameters("trunk"), *head.named_parameters("value")]
    optimizer = build_optimizer(config, model, named, {"value": head}, {"value": 0.7}, None)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for module, rate in ((model.extra_heads, 0.1 * 3.0), (trunk, 0.1), (head, 0.7)):
        assert [rates[id(p)] for p in module.parameters()] == [rate, rate]


@pytest.mark.parametrize("total", [1, 2])
def test_runs_of_one_or_two_steps_have_a_rate(total):
    for type_ in ("constant", "linear", "cosine"):
        assert learning_rate_factor(ScheduleConfig(type=type_), 0, total) == 1.0


def eight_bits(**settings):
    pytest.importorskip("bitsandbytes")
    model = torch.nn.Linear(96, 64)
    torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    return model, AdamW8bit(lr=0.01, **settings).build(list(model.named_parameters()))


def steps(model, optimizer, first, last):
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()


def test_adamw_in_8_bits_is_nearly_adamw_at_a_quarter_of_its_state():
    model, optimizer = eight_bits(weight_decay=0.1)
    plain, _ = eight_bits()
    steps(model, optimizer, 0, 20)
    steps(plain, AdamW(lr=0.01, weight_decay=0.1).build(list(plain.named_parameters())), 0, 20)
    start, _ = eight_bits()
    moved = (plain.weight - start.weight).abs().mean()
    assert (model.weight - plain.weight).abs().mean() < 0.05 * moved
    state = optimizer.state[model.weight]
    assert {state[name].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert optimizer.state[model.bias]["state1"].dtype == torch.float32


def test_adamw_in_8_bits_is_in_a_checkpoint_bit_for_bit(tmp_path):
    whole, optimizer = eight_bits()
    steps(whole, optimizer, 0, 3)
    saved = save_checkpoint(tmp_path, 3, whole, optimizer, {})
    steps(whole, optimizer, 3, 6)
    again, optimizer = eight_bits()
    load_checkpoint(saved, again, optimizer)
    steps(again, optimizer, 3, 6)
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)


def test_what_8_bits_cannot_do_is_refused():
    with pytest.raises(
        ConfigError, match=r"optimizer\.paged: memory is paged between a GPU and its host, .* on cpu; remove it"
    ):
        eight_bits(paged=True)
    meta = torch.nn.Linear(3, 3, device="meta")
    with pytest.raises(ConfigError, match=r"optimizer\.type: 'adamw-8bit' computes on NVIDIA GPUs and on CPUs"):
        AdamW8bit().build(list(meta.named_parameters()))
    assert AdamW8bit.needs_packages == {"bitsandbytes": "wmtp-core[bnb]"}


def test_a_checkpoint_with_more_tensors_than_the_model_is_refused(tmp_path):
    larger = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = AdamW(lr=0.1).build(list(larger.named_parameters()))
    saved = save_checkpoint(tmp_path, 1, larger, optimizer, {})
    load_checkpoint_weights(saved, larger)
    with pytest.raises(FileError, match=r"model\.1\.\w+ is unexpected"):
        load_checkpoint_weights(saved, larger[:1])
