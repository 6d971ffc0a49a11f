"""``wmtp export``: what others open, against plain re-implementations of how they read it, and the model card."""

import json

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from wmtp.cli import main
from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.exporting.medusa import write_medusa
from wmtp.models.mtp import MTPModel
from wmtp.models.opening import load_weights, open_model
from wmtp.tokenizers.bytes import BytesTokenizer

IDS = [[3, 60, 7, 7, 0, 41, 12]]
SMALL = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_model(kind="block", horizon=4, base=None, **changes):
    torch.manual_seed(0)
    if base is None:
        base = LlamaForCausalLM(LlamaConfig(**SMALL | {"initializer_range": 0.2} | changes))
    return MTPModel(base.eval(), HeadsConfig(kind=kind, horizon=horizon, init="random"), seed=3).eval()


def save(folder, tokenizer=True, **options):
    make_model(**options).save_pretrained(folder)
    if tokenizer:
        BytesTokenizer().save(folder)
    return folder


@torch.no_grad()
def logits_of(model):
    output = model(torch.tensor(IDS))
    return [model.logits(output, head)[0] for head in range(1, model.horizon + 1)], output.hidden[0][0]


@pytest.mark.parametrize("tied", [False, True])
def test_hf_is_opened_by_transformers(tmp_path, capsys, tied):
    save(tmp_path / "model", kind="chained", tie_word_embeddings=tied)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "new" / "hf"), "--format", "hf", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    folder = tmp_path / "new" / "hf"
    assert (answer["folder"], answer["format"], answer["horizon"]) == (str(folder), "hf", 4)
    assert answer["files"].keys() == {path.name for path in folder.iterdir()}
    assert not [name for name in answer["files"] if "mtp_heads" in name]
    expected, _ = logits_of(load_weights(tmp_path / "model"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(IDS)).logits[0], expected[0])
    assert open_model(str(folder), device=torch.device("cpu")).model.horizon == 1


def test_meta_takes_the_sentencepiece_file_and_opens_again(tmp_path, capsys):
    lines = [f"def f{i}(x): return x + {i} * {i % 7}" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, minloglevel=2
    )
    model = make_model(vocab_size=60)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "tokenizer.model").rename(tmp_path / "model" / "tokenizer.model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "meta"), "--format", "meta"]) == 0
    assert "consolidated.pth" in capsys.readouterr().out
    read = [(tmp_path / name / "tokenizer.model").read_bytes() for name in ("model", "meta")]
    assert read[0] == read[1]
    opened = open_model(str(tmp_path / "meta"), device=torch.device("cpu"))
    assert opened.tokenizer.vocab_size == 60
    state = opened.model.state_dict()
    assert not [name for name, tensor in model.state_dict().items() if not torch.equal(state[name], tensor)]
    # no tensor drags the storage of another along
    assert (tmp_path / "meta" / "consolidated.pth").stat().st_size < 2 * sum(map(torch.numel, state.values())) + 20_000
    assert main(["generate", str(tmp_path / "meta"), "--prompt", "def", "--max-new-tokens", "3", "--speculative"]) == 0


class VllmMedusa:
    """Do what vLLM does with a draft folder.

    That is ``MedusaConfig.from_pretrained``, ``Medusa.load_weights``, ``forward`` and ``compute_logits``, written down again
    from its source (vllm/model_executor/models/medusa.py).
    """

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("medusa", ["MedusaModel"])
        for name in list(config):
            if "num" in name and "heads" in name:
                config["num_heads"] = config.pop(name)
            elif "num" in name and "layers" in name:
                config["num_hidden_layers"] = config.pop(name)
        size, heads, layers = (config[name] for name in ("hidden_size", "num_heads", "num_hidden_layers"))
        assert config["truncated_vocab_size"] == config["vocab_size"]
        shapes = {}
        for head in range(heads):
            for layer in range(layers):
                shapes[f"blocks.{head}.layers.{layer}.weight"] = (size, size)
                if config.get("medusa_fc_bias", False):
                    shapes[f"blocks.{head}.layers.{layer}.bias"] = (size,)
        shared = config.get("original_lm_head", False)
        names = ["lm_head.weight"] if shared else [f"lm_heads.{head}.weight" for head in range(heads)]
        shapes |= dict.fromkeys(names, (config["vocab_size"], size))
        self.parameters = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            own = "lm_head.weight" if shared and name == "lm_heads.0.weight" else name
            assert own in shapes, f"vLLM would leave {name} out"
            assert tuple(tensor.shape) == shapes[own]
            self.parameters[own] = tensor
        assert self.parameters.keys() == shapes.keys()
        self.heads, self.layers, self.shared, self.scale = heads, layers, shared, config.get("logit_scale", 1.0)

    def logits(self, hidden):
        found = []
        for head in range(self.heads):
            x = hidden
            for layer in range(self.layers):
                name = f"blocks.{head}.layers.{layer}"
                x = x + F.silu(F.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")))
            weight = self.parameters["lm_head.weight" if self.shared else f"lm_heads.{head}.weight"]
            found.append(F.linear(x, weight) * self.scale)
        return found


@pytest.mark.parametrize("kind", ["residual", "linear"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_medusa_heads_are_what_vllm_computes(tmp_path, kind, architecture):
    size = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    model = make_model(kind, base=GPT2LMHeadModel(GPT2Config(**size)) if architecture == "gpt2" else None)
    with torch.no_grad():  # biases begin at 0
        for parameter in model.extra_heads.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    write_medusa(model, tmp_path)
    expected, hidden = logits_of(model)
    found = VllmMedusa(tmp_path).logits(hidden)
    assert len(found) == 3
    for own, theirs in zip(expected[1:], found, strict=True):
        torch.testing.assert_close(theirs, own, rtol=0, atol=0)
    assert not torch.equal(found[0], found[1])


def test_medusa_scales_where_the_model_does_and_refuses_what_it_cannot(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

    sizes = SMALL | {"initializer_range": 0.2, "pad_token_id": 0}
    scaled = make_model("residual", base=CohereForCausalLM(CohereConfig(**sizes, num_key_value_heads=4, logit_scale=0.25)))
    write_medusa(scaled, tmp_path)
    expected, hidden = logits_of(scaled)
    for own, theirs in zip(expected[1:], VllmMedusa(tmp_path).logits(hidden), strict=True):
        torch.testing.assert_close(theirs, own, rtol=1e-6, atol=1e-6)
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=4, head_dim=8))
    for base, message in ((capped, "softcapping"), (PhiForCausalLM(PhiConfig(**sizes)), "unembedding has a bias")):
        with pytest.raises(ConfigError, match=message):
            write_medusa(make_model("residual", base=base), tmp_path)


def _fails(capsys, *command):
    capsys.readouterr()
    assert main(["export", *map(str, command)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_mistakes_are_said_and_leave_nothing(tmp_path, capsys):
    block = save(tmp_path / "block")
    plain = save(tmp_path / "plain", horizon=1)
    new = tmp_path / "new"
    assert "invalid choice: 'onnx'" in _fails(capsys, block, new, "--format", "onnx")
    assert "no such run" in _fails(capsys, tmp_path / "none", new, "--format", "hf")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    assert "no model: the folder holds none of config.json" in _fails(capsys, tmp_path / "notes", new, "--format", "hf")
    assert "is no empty folder" in _fails(capsys, block, tmp_path / "notes", "--format", "hf")
    assert "is no empty folder" in _fails(capsys, block, tmp_path / "notes" / "a.txt", "--format", "hf")
    for format in ("meta", "medusa"):
        assert "no extra heads (H = 1)" in _fails(capsys, plain, new, "--format", format)
    assert "they are of kind 'block'" in _fails(capsys, block, new, "--format", "medusa")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block", "notes", "plain"]
    new.mkdir()  # an empty folder is as good as none
    assert main(["export", str(save(tmp_path / "bare", tokenizer=False)), str(new), "--format", "hf"]) == 0
    assert "the model has no tokenizer beside it" in capsys.readouterr().err
    assert "tokenizer: none was found" in (new / "README.md").read_text()


def test_the_card_says_what_the_run_knows_and_what_nobody_does(tmp_path, recipe, capsys):
    run = [
        "--run-name",
        "tiny",
        "--set",
        "train.max_steps=6",
        "--set",
        "train.eval_interval=3",
        "--set",
        'eval=[{type="perplexity"}]',
    ]
    assert main(["run", str(recipe), *run]) == 0
    folder = tmp_path / "runs" / "tiny"
    secret = "https://me:secret@host/data?signature=secret"
    for model in (folder, folder / "model"):
        target = tmp_path / f"of {model.name}"
        config = folder / "config.toml"
        config.write_text(config.read_text().replace(f"{tmp_path}/code.jsonl", secret))
        assert main(["export", str(model), str(target), "--format", "meta"]) == 0
        card = (target / "README.md").read_text()
        assert "# tiny" in card
        assert "- trainer: `baseline-mtp`" in card
        assert "- steps: 6" in card
        assert "- `code`: `jsonl`, `https://host/data`" in card
        assert "secret" not in card
        assert "max_steps = 6" in card
        last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
        assert f"| loss/head_2 | {last['loss/head_2']:.4f} | 6 |" in card
        assert "| metric | step 3 | step 6 |" in card, "before and after"
        assert f" | {last['eval/tokens_per_forward']:.4g} |" in card
        found = json.loads((folder / "evaluation-details.json").read_text())["perplexity"]["results"]["head_2"]
        interval = f"{found['low']:.4g} to {found['high']:.4g}"
        assert f"| perplexity | head_2 | {found['value']:.4g} | {interval} | {found['n']} documents |" in card
        assert "## Limits" in card
        assert not (model / "README.md").exists()
    save(tmp_path / "bare model")
    assert main(["export", str(tmp_path / "bare model"), str(tmp_path / "of bare"), "--format", "hf"]) == 0
    card = (tmp_path / "of bare" / "README.md").read_text()
    assert "Not recorded" in card
    assert "No results are recorded" in card
    capsys.readouterr()
