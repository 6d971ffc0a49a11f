"""``wmtp export --format mtp``: a folder that servers take for a MiMo-7B or a K-EXAONE, and those that they would not."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from wmtp.cli import main
from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.exporting.refused import REFUSED
from wmtp.exporting.served import write_served
from wmtp.models.mtp import MTPModel
from wmtp.models.native.layouts import SERVED
from wmtp.models.opening import load_model
from wmtp.tokenizers.bytes import BytesTokenizer

SMALL = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
IDS = torch.tensor([[3, 60, 7, 7, 0, 41, 12]])


def bases():
    torch.manual_seed(0)
    yield "llama", LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=ROPE))
    yield "tied", LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    yield "mistral", MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None))
    yield "phi3", Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0, sliding_window=None))
    yield "qwen2", Qwen2ForCausalLM(Qwen2Config(**SMALL))
    yield "qwen3", Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, rope_parameters=ROPE))
    yield "qwen3_tied", Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True))


def with_heads(base, **heads):
    model = MTPModel(base.eval(), HeadsConfig(**{"kind": "shared", "horizon": 4, "init": "random"} | heads), seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def served_names(name, layers):
    """Return the tensors that vLLM 0.32 loads.

    As MiMo those of ``Qwen2Model`` and ``MiMoMultiTokenPredictorLayer``, as K-EXAONE those of ``ExaoneMoeModel`` and
    ``ExaoneMoeMultiTokenPredictor``.
    """
    exaone = name.startswith("qwen3")
    layer = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    layer += [f"self_attn.{part}_norm.weight" for part in "qk"] if exaone else [f"self_attn.{part}_proj.bias" for part in "qkv"]
    layer += ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names = {f"model.layers.{number}.{part}" for number in range(layers) for part in layer}
    if exaone:
        names |= {f"mtp.{part}.weight" for part in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")}
        names |= {f"mtp.layers.0.{part}" for part in layer}
    else:
        own = ["token_layernorm.weight", "hidden_layernorm.weight", "input_proj.weight", "final_layernorm.weight"]
        names |= {f"model.mtp_layers.0.{part}" for part in layer + own}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    return names if "tied" in name else names | {"lm_head.weight"}


@pytest.mark.parametrize(("name", "base"), bases(), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("heads", [{}, {"kind": "chained", "horizon": 2}], ids=["shared", "chained"])
@torch.no_grad()
def test_a_server_finds_all_it_loads_and_wmtp_the_same_heads(tmp_path, capsys, name, base, heads):
    model = with_heads(base, **heads)
    model.save_pretrained(tmp_path / "model")
    BytesTokenizer().save(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "served"), "--format", "mtp"]) == 0, capsys.readouterr()
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    named = (["ExaoneMoeForCausalLM"], "exaone_moe") if name.startswith("qwen3") else (["MiMoForCausalLM"], "qwen2")
    assert (config["architectures"], config["model_type"]) == named
    assert config["num_nextn_predict_layers"] == 1
    assert config["rope_parameters"]["rope_theta"] == base.config.rope_parameters["rope_theta"]
    tensors = {key: value for file in (tmp_path / "served").glob("*.safetensors") for key, value in load_file(file).items()}
    assert tensors.keys() == served_names(name, 3)
    assert [file.name for file in (tmp_path / "served").glob("model*")] == ["model.safetensors"]
    again = load_model(tmp_path / "served")
    assert (again.heads.kind, again.horizon) == ("native", 2)
    old, new = model(IDS), again(IDS)
    near = {"rtol": 1e-4, "atol": 1e-5} if name == "phi3" else {"rtol": 1e-6, "atol": 1e-6}  # joined maps round otherwise
    for head in (1, 2):
        torch.testing.assert_close(again.logits(new, head), model.logits(old, head), **near)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert plain.config.model_type == config["model_type"]
    torch.testing.assert_close(plain(IDS).logits, base(IDS).logits, **near)
    if name != "phi3":
        assert torch.equal(plain(IDS).logits, base(IDS).logits)
    assert "speculative-config" in (tmp_path / "served" / "README.md").read_text()


def test_what_the_layout_cannot_hold_is_refused_with_the_reason(tmp_path):
    def refused(base, why, **heads):
        with pytest.raises(ConfigError, match=re.escape(why)):
            write_served(with_heads(base, **heads), tmp_path)
        assert not list(tmp_path.iterdir())

    llama = LlamaForCausalLM(LlamaConfig(**SMALL))
    refused(llama, "no extra heads (H = 1); use --format hf", kind="block", horizon=1)
    refused(llama, "of kind 'block', which no current server reads; train heads of kind 'shared'", kind="block")
    refused(llama, "it has 3 chained modules, and the loaders of these layouts take one", kind="chained")
    refused(llama, 'trained with layout = "plain", and a server feeds them otherwise', layout="plain")
    refused(llama, 'and a server feeds them otherwise; train them with layout = "mimo"', layout="exaone")
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8))
    refused(
        qwen3,
        'trained with layout = "mimo", and a server feeds them otherwise; train them with layout = "exaone"',
        layout="mimo",
    )
    refused(Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, attention_bias=True)), "its attention's output has a bias")
    refused(LlamaForCausalLM(LlamaConfig(**SMALL, hidden_act="gelu")), "its activation is 'gelu', and servers compute silu")
    refused(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)), "its attention has a sliding window")
    wide = LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=16))
    refused(wide, "its heads are 16 wide, which is not its hidden size over their number, and vLLM's Qwen2 takes no other")
    refused(Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0, sliding_window=8)), "its attention has a sliding window")
    part = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    refused(Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0, rope_parameters=part)), "it turns 50% of each head by position")
    long = {"rope_type": "longrope", "rope_theta": 5000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    refused(Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0, rope_parameters=long)), "scaled by longrope")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4))
    refused(gpt2, "it is a GPT2LMHeadModel, and they hold LlamaForCausalLM, MistralForCausalLM, ")
    refused(
        gpt2, "Qwen3ForCausalLM: its layers subtract the mean (LayerNorm), and those of the layouts have RMS norms; its pos"
    )
    biased = LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True))
    refused(biased, "its attention's output has a bias")
    sliding = Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1))
    refused(sliding, "its attention has a sliding window")


def test_reasons_are_of_classes_that_there_are_and_the_page_lists_each():
    page = (Path(__file__).parent.parent / "docs/serving.md").read_text(encoding="utf-8")
    for name, reason in REFUSED.items():
        assert hasattr(transformers, name), name
        assert f"`{name.removesuffix('ForCausalLM').removesuffix('LMHeadModel')}`" in page, name
        assert re.fullmatch(r"(it|its) .*[^.]", reason), name
    assert not REFUSED.keys() & SERVED.keys()
