"""Meta's checkpoints against a plain implementation of their own forward pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.exporting.meta import _width, write_meta
from wmtp.models import build_model
from wmtp.models.config import MetaMtpModel
from wmtp.models.mtp import MTPModel

PARAMS = {
    "dim": 32,
    "n_layers": 5,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 61,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 500.0,
    "n_future_tokens": 3,
    "max_seq_len": 64,
}


def make_state(params: dict) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    dim, heads = params["dim"], params["n_heads"]
    kv = (params.get("n_kv_heads") or heads) * dim // heads
    multiple = params["multiple_of"]
    ffn = multiple * -(-int(2 * 4 * dim / 3) // multiple)
    vocab = 61
    state = {"tok_embeddings.weight": weight(vocab, dim), "output.weight": weight(vocab, dim), "norm.weight": 1 + weight(dim)}
    horizon = params["n_future_tokens"]
    names = [f"layers.{i}" for i in range(params["n_layers"] - horizon + 1)] + [f"extra_heads.{j}" for j in range(horizon - 1)]
    for name in names:
        state |= {
            f"{name}.attention.wq.weight": weight(dim, dim),
            f"{name}.attention.wk.weight": weight(kv, dim),
            f"{name}.attention.wv.weight": weight(kv, dim),
            f"{name}.attention.wo.weight": weight(dim, dim),
            f"{name}.feed_forward.w1.weight": weight(ffn, dim),
            f"{name}.feed_forward.w2.weight": weight(dim, ffn),
            f"{name}.feed_forward.w3.weight": weight(ffn, dim),
            f"{name}.attention_norm.weight": 1 + weight(dim),
            f"{name}.ffn_norm.weight": 1 + weight(dim),
        }
    return state


def plain_logits(state: dict[str, Tensor], params: dict, ids: list[int]) -> list[Tensor]:
    """Logits ``[S, V]`` of every head, one position and one attention head at a time, in fp64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    heads = params["n_heads"]
    kv_heads = params.get("n_kv_heads") or heads
    size = params["dim"] // heads
    theta = params.get("rope_theta", 10000.0)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weight

    def rotate(x: Tensor, position: int) -> Tensor:
        # neighbouring numbers are real and imaginary part of one complex number
        angles = position * theta ** (-torch.arange(0, size, 2).double() / size)
        turned = torch.view_as_complex(x.reshape(-1, 2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten()

    def block(name: str, x: Tensor) -> Tensor:
        def matrix(part: str) -> Tensor:
            return state[f"{name}.{part}.weight"]

        h = norm(x, matrix("attention_norm"))
        q, k, v = (h @ matrix(f"attention.{w}").T for w in ("wq", "wk", "wv"))
        q, k, v = q.view(len(ids), heads, size), k.view(len(ids), kv_heads, size), v.view(len(ids), kv_heads, size)
        out = torch.zeros(len(ids), heads, size, dtype=torch.float64)
        for t in range(len(ids)):
            for head in range(heads):
                group = head // (heads // kv_heads)
                query = rotate(q[t, head], t)
                scores = torch.stack([query @ rotate(k[s, group], s) / size**0.5 for s in range(t + 1)])
                out[t, head] = scores.softmax(0) @ v[: t + 1, group]
        x = x + out.flatten(1) @ matrix("attention.wo").T
        h = norm(x, matrix("ffn_norm"))
        gate = h @ matrix("feed_forward.w1").T
        return x + (gate * gate.sigmoid() * (h @ matrix("feed_forward.w3").T)) @ matrix("feed_forward.w2").T

    x = state["tok_embeddings.weight"][ids]
    blocks = params["n_layers"] - params["n_future_tokens"] + 1
    for index in range(blocks - 1):
        x = block(f"layers.{index}", x)
    names = [f"layers.{blocks - 1}"] + [f"extra_heads.{j}" for j in range(params["n_future_tokens"] - 1)]
    return [norm(block(name, x), state["norm.weight"]) @ state["output.weight"].T for name in names]


def write(folder: Path, params: dict, state: dict[str, Tensor], name: str = "consolidated.pth") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(state, folder / name)
    return folder


def load(folder: Path):
    return MetaMtpModel(uri=str(folder)).build().load(folder, dtype=torch.float32, seed=0)


VARIANTS = {
    "grouped": PARAMS,
    "no n_kv_heads": {key: value for key, value in PARAMS.items() if key != "n_kv_heads"},
    "null n_kv_heads": {**PARAMS, "n_kv_heads": None},
    "no vocab_size": {key: value for key, value in PARAMS.items() if key != "vocab_size"},
    "vocab_size -1": {**PARAMS, "vocab_size": -1},
    "default theta": {key: value for key, value in PARAMS.items() if key != "rope_theta"},
    "one head": {**PARAMS, "n_future_tokens": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_all_heads(tmp_path: Path, variant: str):
    params = VARIANTS[variant]
    state = make_state(params)
    write(tmp_path, params, state)
    model = build_model(load(tmp_path), None, seed=0)
    assert model.horizon == params["n_future_tokens"]
    ids = [3, 60, 7, 7, 0, 41, 12]
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    for head, expected in enumerate(plain_logits(state, params, ids), start=1):
        torch.testing.assert_close(model.logits(output, head)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_info_and_what_follows_from_it(tmp_path: Path):
    write(tmp_path, PARAMS, {**make_state(PARAMS), "rope.freqs": torch.zeros(4)})
    info = MetaMtpModel(uri="").build().info(tmp_path)
    assert info.heads == HeadsConfig(kind="block", horizon=3)
    assert (info.architecture, info.layers, info.hidden_size, info.vocab_size) == ("LlamaForCausalLM", 3, 32, 61)
    assert info.max_positions == 64
    loaded = load(tmp_path)
    assert info.parameters == sum(parameter.numel() for parameter in loaded.model.parameters())
    assert MetaMtpModel(uri="", max_positions=2048).build().info(tmp_path).max_positions == 2048


def test_the_older_file_name(tmp_path: Path):
    write(tmp_path, PARAMS, make_state(PARAMS), "consolidated.00.pth")
    assert load(tmp_path).heads == HeadsConfig(kind="block", horizon=3)
    write(tmp_path, PARAMS, make_state(PARAMS), "consolidated.01.pth")
    with pytest.raises(WMTPError, match="2 tensor-parallel shards"):
        load(tmp_path)


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path):
    state = make_state(PARAMS)
    del state["extra_heads.1.attention.wk.weight"]
    state["layers.3.ffn_norm.weight"] = torch.ones(32)
    state["layers.0.attention.wq.weight"] = torch.zeros(8, 32)
    write(tmp_path, PARAMS, state)
    with pytest.raises(WMTPError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "extra_heads.1.attention.wk.weight is missing" in message
    assert "layers.3.ffn_norm.weight is unexpected" in message
    assert "layers.0.attention.wq.weight has shape [8, 32] in place of [32, 32]" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": "wide"}, "dim must be a number above 0, not 'wide'"),
        ({"n_heads": None}, "n_heads must be a number above 0"),
        ({"n_heads": 5}, "do not go together"),
        ({"n_layers": 2}, "n_layers = 2 counts every head"),
        ({"n_future_tokens": 4}, r"extra_heads\.2\..* is missing"),
        ({"vocab_size": 62}, r"tok_embeddings\.weight has shape \[61, 32\] in place of \[62, 32\]"),
        ({"use_scaled_rope": True}, "use_scaled_rope is not supported"),
    ],
)
def test_params_that_do_not_fit(tmp_path: Path, change: dict, message: str):
    write(tmp_path, {**PARAMS, **change}, make_state(PARAMS))
    for action in (load, MetaMtpModel(uri="").build().info):
        with pytest.raises(WMTPError, match=message):
            action(tmp_path)


def test_files_that_are_missing_or_damaged(tmp_path: Path):
    with pytest.raises(WMTPError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(WMTPError, match=r"params\.json: no such file"):
        load(tmp_path)
    write(tmp_path, PARAMS, make_state(PARAMS))
    file = tmp_path / "consolidated.pth"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(WMTPError, match=r"consolidated\.pth: .*cannot open it"):
        load(tmp_path)
    torch.save([torch.zeros(1)], file)
    with pytest.raises(WMTPError, match="no plain mapping from names to tensors"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(WMTPError, match=r"holds no consolidated\.pth"):
        load(tmp_path)


def test_export_gives_the_file_back(tmp_path: Path):
    for name, params in (("grouped", PARAMS), ("one group", VARIANTS["no n_kv_heads"])):
        state = make_state(params)
        model = build_model(load(write(tmp_path / name, params, state)), None, seed=0)
        target = tmp_path / f"{name} again"
        target.mkdir()
        write_meta(model, target)
        again = torch.load(target / "consolidated.pth", weights_only=True)
        assert again.keys() == state.keys()
        assert not [key for key in state if not torch.equal(again[key], state[key])]
        written = json.loads((target / "params.json").read_text())
        # several multiples give the same width
        assert written | {"multiple_of": 16} == {**params, "n_kv_heads": params.get("n_kv_heads", 4)}


@pytest.mark.parametrize("tied", [False, True])
def test_exported_heads_are_the_models(tmp_path: Path, tied: bool):
    """By the plain forward pass, which knows nothing of transformers' names and order of rows."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "initializer_range": 0.2}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(1)
    model = MTPModel(LlamaForCausalLM(config).eval(), HeadsConfig(horizon=3, init="random"), seed=5).eval()
    write_meta(model, tmp_path)
    state = torch.load(tmp_path / "consolidated.pth", weights_only=True)
    params = json.loads((tmp_path / "params.json").read_text())
    ids = [3, 60, 7, 7, 0, 41, 12]
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    for head, expected in enumerate(plain_logits(state, params, ids), start=1):
        torch.testing.assert_close(model.logits(output, head)[0].double(), expected, rtol=1e-5, atol=1e-5)
    again = build_model(load(tmp_path), None, seed=0).state_dict()
    assert not [name for name, tensor in model.state_dict().items() if not torch.equal(again[name], tensor)]


@given(dim=st.integers(8, 9000), ffn=st.integers(1, 40000))
def test_metas_formula_gives_the_width(dim: int, ffn: int):
    params = _width(dim, ffn)
    hidden = int(2 * (4 * dim) / 3)
    if "ffn_dim_multiplier" in params:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params["multiple_of"]
    assert multiple * ((hidden + multiple - 1) // multiple) == ffn
    assert _width(4096, 11008) == {"multiple_of": 256}  # Llama 2 7B


SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
CANNOT_HOLD = {
    "linear": (LlamaConfig(**SMALL), HeadsConfig(kind="linear"), "kind 'linear', and the layout has decoder layers"),
    "one head": (LlamaConfig(**SMALL), HeadsConfig(horizon=1), r"no extra heads \(H = 1\)"),
    "biases": (
        LlamaConfig(**SMALL, attention_bias=True),
        HeadsConfig(),
        r"no place for .*model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "activation": (LlamaConfig(**SMALL, hidden_act="gelu"), HeadsConfig(), "activation is 'gelu'"),
    "head size": (
        LlamaConfig(**SMALL, head_dim=16),
        HeadsConfig(),
        "heads are 16 wide, and the layout's are dim / n_heads = 8",
    ),
    "positions": (
        LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        HeadsConfig(),
        r"scaled \(rope_type 'linear'\)",
    ),
    "architecture": (
        MistralConfig(**SMALL, num_key_value_heads=2),
        HeadsConfig(),
        "it is for LlamaForCausalLM, and this is a MistralForCausalLM",
    ),
}


@pytest.mark.parametrize("case", CANNOT_HOLD)
def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path, case: str):
    config, heads, message = CANNOT_HOLD[case]
    base = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match=message):
        write_meta(MTPModel(base, heads, seed=0), tmp_path)
    assert not any(tmp_path.iterdir())
