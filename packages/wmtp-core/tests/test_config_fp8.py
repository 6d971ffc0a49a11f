"""Rules of ``devices.precision = "fp8"``, which ask neither torch nor torchao."""

import pytest
from attrs import evolve

from wmtp.actions.check import check
from wmtp.config import fp8_rules
from wmtp.config.fp8_rules import fp8_misfits
from wmtp.config.load import load
from wmtp.config.rules import check_loaded
from wmtp.config.schema import DevicesConfig, Fp8Config, HeadsConfig
from wmtp.errors import ConfigError

GOOD = {
    "models": {"base": {"type": "scratch", "vocab_size": 300}},
    "datasets": {"py": {"type": "python-source"}},
    "trainer": {"type": "baseline-mtp"},
    "devices": {"precision": "fp8"},
}


@pytest.fixture(autouse=True)
def _torchao(monkeypatch):
    monkeypatch.setattr(fp8_rules, "find_spec", lambda _: "there")


def problems(*sets):
    with pytest.raises(ConfigError) as caught:
        check_loaded(load([GOOD], sets))
    return list(caught.value.problems)


@pytest.mark.parametrize(
    "sets",
    [[], ["devices.fp8={recipe = 'rowwise'}", "devices.device=cuda"], ["devices.device=cpu", "devices.fp8={emulate = true}"]],
)
def test_what_can_be_passes(sets):
    check_loaded(load([GOOD], sets))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["devices.device=cpu"],
            'devices.precision: fp8 needs an NVIDIA GPU, and devices.device = "cpu"; write "bf16-params", or',
        ),
        (["devices.device=mps"], 'devices.precision: fp8 needs an NVIDIA GPU, and devices.device = "mps"'),
        (
            ["devices.precision=bf16", "devices.fp8={}"],
            'devices.fp8: has no effect: devices.precision = "bf16" computes nothing',
        ),
        (["models.base.quantize=nf4"], "devices.precision: models.base.quantize keeps the layers in 4 bits"),
        (
            ["devices.fp8={recipe = 'rowwise', fast_accumulation = 'all'}"],
            'fast_accumulation: "all" with recipe = "rowwise" gave',
        ),
        (["devices.fp8={recipe = 'row'}"], "devices.fp8.recipe"),
        (["devices.fp8={logits = 'all'}"], "devices.fp8.logits"),
        (
            ["devices.fp8={logits = 'forward'}", "models.base.heads.horizon=3", "models.base.heads.objective=kl"],
            'devices.fp8.logits: models.base.heads.objective = "kl" compares logits in bf16; write "none"',
        ),
        (["devices.fp8={min_features = 8}"], "devices.fp8.min_features"),
    ],
)
def test_what_cannot_be_is_said_with_the_way_out(sets, message):
    assert any(message in line for line in problems(*sets)), problems(*sets)


def test_without_torchao_the_check_says_what_to_install_unless_the_run_is_elsewhere(monkeypatch):
    monkeypatch.setattr(fp8_rules, "find_spec", lambda _: None)
    check_loaded(load([GOOD], ()))  # one scale a tensor needs none
    (line,) = problems("devices.fp8={recipe = 'rowwise'}")
    assert "devices.fp8.recipe: \"rowwise\" needs torchao: pip install 'wmtp-core[fp8]', or write" in line


@pytest.mark.parametrize(
    ("fp8", "hidden_size", "message"),
    [
        ({}, 72, "devices.precision: fp8 products need hidden states of a multiple of 16 numbers, and this model has 72"),
        ({}, 240, "devices.fp8.min_features: this model's hidden states have 240 numbers, and with 256 no map is left"),
        (
            {"first_layers": 2, "last_layers": 3},
            512,
            "devices.fp8.first_layers: 5 decoder layers are to stay in bf16, and this",
        ),
        ({"last_layers": 5}, 512, "devices.fp8.last_layers: 5 decoder layers are to stay in bf16, and this model has 4; write"),
    ],
)
def test_what_a_models_shape_excludes_is_said(fp8, hidden_size, message):
    devices = DevicesConfig(precision="fp8", fp8=Fp8Config(**fp8))
    (line, *_) = fp8_misfits(devices, hidden_size=hidden_size, layers=4)
    assert line.startswith(message)
    assert fp8_misfits(evolve(devices, precision="bf16-params", fp8=None), hidden_size=hidden_size, layers=4) == []


def test_what_a_models_shape_allows_passes():
    fp8 = Fp8Config(first_layers=2, last_layers=2)
    assert fp8_misfits(DevicesConfig(precision="fp8", fp8=fp8), hidden_size=256, layers=4) == []


MAPS = [
    f"model.layers.{layer}.{name}" for layer in range(4) for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    ("pattern", "heads", "message"),
    [
        ("*.k_porj", None, "devices.fp8.exclude: '*.k_porj' names no linear map of the layers; did you mean 'k_proj'?"),
        ("model.layers.0.*", None, "; there are base.model.layers.0.self_attn.q_proj and extra_heads.0.mlp.up_proj, for"),
        ("base.model.layers.4.*", None, "'base.model.layers.4.*' names no linear map"),
        ("extra_heads.*", {"horizon": 1}, "'extra_heads.*' names no linear map"),
        ("extra_heads.2.*", {"horizon": 3}, "'extra_heads.2.*' names no linear map"),
        ("extra_heads.*", {"horizon": 3, "kind": "linear"}, "'extra_heads.*' names no linear map"),
        ("*.projection", {"horizon": 3, "kind": "block"}, "'*.projection' names no linear map"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(pattern, heads, message):
    devices = DevicesConfig(precision="fp8", fp8=Fp8Config(exclude=("*.q_proj", pattern)))
    given = None if heads is None else HeadsConfig(**heads)
    (line,) = fp8_misfits(devices, hidden_size=256, layers=4, maps=MAPS, heads=given)
    assert message in line
    assert fp8_misfits(devices, hidden_size=256, layers=4) == []  # names that are not known are looked for later


@pytest.mark.parametrize("spared", [{"exclude": ("*",)}, {"first_layers": 3, "last_layers": 1}, {"first_layers": 4}])
def test_a_model_of_which_no_map_is_left_is_refused(spared):
    def found(heads, **fp8):
        devices = DevicesConfig(precision="fp8", fp8=Fp8Config(**fp8))
        return fp8_misfits(devices, hidden_size=256, layers=4, maps=MAPS, heads=heads)

    (line,) = found(HeadsConfig(horizon=1), **spared)
    assert "devices.precision: no linear map of this model is left for fp8; spare fewer layers" in line
    assert found(HeadsConfig(horizon=1), first_layers=3) == found(HeadsConfig(horizon=1), exclude=("*.?_proj",)) == []
    assert found(HeadsConfig(horizon=2), first_layers=4) == []  # there are the heads'


def test_check_refuses_a_pattern_with_its_line(tmp_path):
    (tmp_path / "r.toml").write_text(
        'models.base = { type = "scratch", vocab_size = 300 }\ntokenizer.type = "bytes"\ndatasets.py.type = "python-source"\n'
        'trainer.type = "baseline-mtp"\ndevices.precision = "fp8"\ndevices.fp8.exclude = ["*.v_porj"]\n'
    )
    with pytest.raises(ConfigError, match=r"r.toml:6: devices.fp8.exclude: '\*.v_porj' names no linear map"):
        check(tmp_path / "r.toml")


def test_check_says_it_without_the_models_weights():
    recipe = GOOD | {"tokenizer": {"type": "bytes"}, "devices": {"precision": "fp8", "fp8": {"last_layers": 100}}}
    with pytest.raises(ConfigError, match=r"devices.fp8.last_layers: 100 decoder layers"):
        check(recipe)
