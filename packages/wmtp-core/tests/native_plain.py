"""Plain forwards of models' own layers for multi-token prediction, written from the table of layouts and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from native_folders import LAYERS, LIKE_THE_FIRST, NAMING, tensors_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from wmtp.models.loaders.hf import HfLoader

QWEN = ("qwen3_5", "qwen3_next")
#: facts of each layout, once more: what stands first in the projection, the state that is read, what is zero at position 0
HIDDEN_FIRST = ("mimo", "mimo_2")
BEFORE_NORM = ("mimo", "mimo_2")
READS_ALL = (*QWEN, "exaone")
#: tokens that the layer sees
WINDOWS = {"exaone": 4}


def plain_norm(name: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    factor = 1 + weight if name in QWEN else weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * factor


def plain_qwen2_layer(
    tensors: dict[str, Tensor], begin: str, x: Tensor, heads: int, kv: int, theta: float, eps: float
) -> Tensor:
    """Write out a Qwen2 layer: attention with biases and rotated halves, then a gated feed-forward part."""
    rows, length, width = x.shape
    size = width // heads

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, tensors[f"{begin}{name}.weight"], tensors.get(f"{begin}{name}.bias"))

    def rotated(value: Tensor) -> Tensor:
        angle = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2).double() / size)
        cos, sin = angle.cos(), angle.sin()
        one, two = value[..., : size // 2], value[..., size // 2 :]
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)

    h = plain_norm("mimo", x, tensors[f"{begin}input_layernorm.weight"], eps)
    q, k, v = (linear(f"self_attn.{part}_proj", h).view(rows, length, -1, size).transpose(1, 2) for part in ("q", "k", "v"))
    k, v = k.repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
    scores = rotated(q) @ rotated(k).transpose(-1, -2) / size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    x = x + linear("self_attn.o_proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width))
    h = plain_norm("mimo", x, tensors[f"{begin}post_attention_layernorm.weight"], eps)
    return x + linear("mlp.down_proj", F.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h))


def transformers_layer(name: str, folder: Path, base: PreTrainedModel, x: Tensor) -> Tensor:
    """Run the layer as transformers reads it in a model that has it as its own."""
    twin = AutoModelForCausalLM.from_pretrained(folder.parent / f"{folder.name}_twin", dtype=torch.float64)
    twin.set_experts_implementation("eager")
    layer: nn.Module = twin.model.layers[0 if name in LIKE_THE_FIRST else LAYERS - 1]
    places = torch.arange(x.shape[1])[None]
    away = places.mT - places  # from a query to a key
    hidden = (away < 0) | (away >= WINDOWS.get(name, x.shape[1]))
    mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)[None, None]
    # Qwen3.5 counts in three directions, and transformers before 5.24 does not do so by itself
    around = base.model.rotary_emb(x, places.expand(3, 1, -1) if name.startswith("qwen3_5") else places)
    output = layer(x, attention_mask=mask, position_embeddings=around, position_ids=places)
    return output[0] if isinstance(output, tuple) else output


def plain_logits(name: str, folder: Path, ids: Tensor, horizon: int) -> list[Tensor]:
    """Compute the logits of heads 1..H in float64 by the table of layouts, from the folder's tensors."""
    tensors, trunk = _opened(folder)
    hidden, normed = _states(name, trunk, ids)
    found = [trunk.lm_head(normed)]
    modules = HfLoader().info(folder).native.modules
    for step in range(horizon - 1):
        embedded = _embedded(name, tensors, ids.roll(-step - 1, 1), step % modules, zero_first=step == 0)
        hidden, logits = _module(name, folder, tensors, trunk, step % modules, embedded, hidden)
        found.append(logits)
    return found


@torch.no_grad()
def plain_drafting(name: str, folder: Path, tokens: list[int], drafts: list[int]) -> list[Tensor]:
    """Compute a server's logits ``[V]`` for drafts after ``tokens``, in float64, every step over the whole text anew.

    The layer reads the model's hidden states up to the last but one token, and behind them those that it made itself.

    Args:
        name: of the layout; its folder has one module.
        folder: the model.
        tokens: of which head 1 chose the last.
        drafts: what each step but the last of them is followed by.
    """
    tensors, trunk = _opened(folder)
    hidden, _ = _states(name, trunk, torch.tensor([tokens[:-1]]))
    found: list[Tensor] = []
    for step in range(len(drafts)):
        ids = torch.tensor([tokens[1:] + drafts[:step]])
        embedded = _embedded(name, tensors, ids, 0, zero_first=True)
        output, logits = _module(name, folder, tensors, trunk, 0, embedded, hidden)
        found.append(logits[0, -1])
        hidden = torch.cat([hidden, output[:, -1:]], dim=1)
    return found


def _opened(folder: Path) -> tuple[dict[str, Tensor], PreTrainedModel]:
    """Read the folder's tensors, and its model without further layers."""
    trunk = HfLoader().load(folder, dtype=torch.float64, seed=0).model
    trunk.set_experts_implementation("eager")
    return {key: value.double() for key, value in tensors_of(folder).items()}, trunk


def _states(name: str, trunk: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the model's hidden states that the layout reads, and those behind the final norm."""
    raw: list[Tensor] = []
    handle = trunk.model.norm.register_forward_pre_hook(lambda _, args: raw.append(args[0]))
    normed = trunk.model(input_ids=ids, use_cache=False).last_hidden_state
    handle.remove()
    return raw[0] if name in BEFORE_NORM else normed, normed


def _embedded(name: str, tensors: dict[str, Tensor], ids: Tensor, module: int, *, zero_first: bool) -> Tensor:
    _, parts = NAMING[name](module)
    table = tensors[f"{parts[4]}.weight"] if len(parts) == 6 else tensors["model.embed_tokens.weight"]
    embedded = table[ids].clone()
    if zero_first and name not in READS_ALL:
        embedded[:, 0] = 0
    return embedded


def _module(
    name: str, folder: Path, tensors: dict[str, Tensor], trunk: PreTrainedModel, module: int, embedded: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one module: the hidden states that it makes, and their logits."""
    begin, parts = NAMING[name](module)
    e, h, projection, *rest = (tensors[f"{part}.weight"] for part in parts)
    eps = trunk.config.rms_norm_eps
    both = [plain_norm(name, embedded, e, eps), plain_norm(name, hidden, h, eps)]
    x = torch.cat(both[::-1] if name in HIDDEN_FIRST else both, -1) @ projection.T
    if name.startswith("mimo"):
        x = plain_qwen2_layer(tensors, begin, x, 4, 2, trunk.config.rope_parameters["rope_theta"], eps)
    else:
        x = transformers_layer(name, folder, trunk, x)
    made = x if name == "ernie" else plain_norm(name, x, rest[0], eps)
    return made, made @ (rest[2] if len(rest) == 3 else trunk.lm_head.weight).T
