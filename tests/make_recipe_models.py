"""Writes the two small random models that ``wmtp init chat`` and ``wmtp init native`` bring along.

python tests/make_recipe_models.py writes ``model/`` of both recipes again, bit for bit under the same torch.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

RECIPES = Path(__file__).parents[1] / "packages/wmtp-core/src/wmtp/recipes"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH = 48


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Make one without merges: a token is a byte, or one of the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )


def model(layers: int) -> Qwen2ForCausalLM:
    """Make a random Qwen2."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256 + len(SPECIAL),
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=258,
        pad_token_id=256,
    )
    return Qwen2ForCausalLM(config).to(torch.bfloat16)


def write(folder: Path, *, native: bool) -> None:
    """Write one folder; ``native``: with a layer of its own for multi-token prediction, as MiMo has it."""
    model(2).save_pretrained(folder)
    tokenizer(None if native else TEMPLATE).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    if native:
        config |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
        config["num_nextn_predict_layers"] = 1
        begin = "model.mtp_layers.0."
        last = "model.layers.2."
        deeper = model(3).state_dict()
        added = {begin + name.removeprefix(last): tensor for name, tensor in deeper.items() if name.startswith(last)}
        for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            added[f"{begin}{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        added[f"{begin}input_proj.weight"] = (torch.randn(WIDTH, 2 * WIDTH) * 0.02).to(torch.bfloat16)
        file = folder / "model.safetensors"
        save_file(load_file(file) | added, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Replace both folders."""
    for recipe in ("chat", "native"):
        target = RECIPES / recipe / "model"
        with tempfile.TemporaryDirectory() as temporary:
            write(Path(temporary), native=recipe == "native")
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(temporary).iterdir()):
                (target / file.name).write_bytes(file.read_bytes())
                print(target / file.name, file.stat().st_size)


if __name__ == "__main__":
    main()
