"""Meta's multi-token checkpoints: ``params.json`` and ``consolidated.pth`` (arXiv 2404.19737)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from transformers import LlamaConfig

from wmtp.config.schema import HeadsConfig
from wmtp.errors import FileError
from wmtp.models.base import LoadedModel, ModelInfo, ModelLoader
from wmtp.models.loaders.describe import describe, empty_model
from wmtp.models.loaders.files import read_bin, read_json
from wmtp.models.loaders.hf import from_tensors
from wmtp.models.tensor_fit import misfits

__all__ = ["BLOCK_NAMES", "OUTSIDE_NAMES", "MetaMtpLoader"]

#: Meta's name inside a block → that of a Llama decoder layer
BLOCK_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
#: Meta's name outside of the blocks → that of a Llama model
OUTSIDE_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
# a buffer that some files hold; it follows from the parameters
_COMPUTED = "rope.freqs"


@frozen(kw_only=True)
class _Shape:
    """Dimensions from ``params.json``, completed from the tensors where one is missing."""

    dim: int
    blocks: int
    horizon: int
    heads: int
    kv_heads: int
    ffn: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class MetaMtpLoader(ModelLoader):
    """Reads Meta's layout as a Llama model with ``block`` heads.

    ``n_layers`` counts every head: the file has ``n_layers − n_future_tokens + 1`` blocks in ``layers``, of which the last is
    head 1, and heads 2..H in ``extra_heads``.

    Args:
        max_positions: the longest input; None takes ``max_seq_len``, or 4096 where the file does not say.
    """

    def __init__(self, *, max_positions: int | None = None) -> None:
        self._max_positions = max_positions

    def info(self, path: Path | None) -> ModelInfo:
        """See `ModelLoader.info`."""
        shape, _ = self._read(path)
        return describe(empty_model(_config(shape)), _heads(shape))

    def load(self, path: Path | None, *, dtype: torch.dtype, seed: int) -> LoadedModel:
        """See `ModelLoader.load`."""
        shape, tensors = self._read(path)
        base: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.removesuffix(".weight").partition(".")
            index, _, part = rest.partition(".")
            if group in OUTSIDE_NAMES:
                base[f"{OUTSIDE_NAMES[group]}.weight"] = tensor.to(dtype)
                continue
            value = _rotate_half_rows(part, tensor, shape).to(dtype)
            if group == "layers":
                base[f"model.layers.{index}.{BLOCK_NAMES[part]}.weight"] = value
            else:
                extra[f"{index}.{BLOCK_NAMES[part]}.weight"] = value
        assert path is not None, "_read has read it"
        model = from_tensors(path, _config(shape), base, {"dtype": dtype})
        return LoadedModel(model=model, heads=_heads(shape), head_state=extra or None)

    def _read(self, path: Path | None) -> tuple[_Shape, dict[str, Tensor]]:
        if path is None or not path.is_dir():
            raise FileError(f"{path}: no such folder; a Meta checkpoint is a folder with params.json and consolidated.pth")
        params = read_json(path / "params.json")
        tensors = _read_tensors(_weights(path))
        shape = self._shape(path / "params.json", params, tensors)
        if problems := misfits(_expected(shape), tensors):
            raise FileError(f"{path}: the tensors do not fit params.json: {'; '.join(problems)}")
        return shape, tensors

    def _shape(self, file: Path, params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> _Shape:
        def number(name: str, default: float | None = None) -> Any:
            value = params.get(name)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise FileError(f"{file}: {name} must be a number above 0, not {value!r}")
            return value

        if params.get("use_scaled_rope"):
            raise FileError(f"{file}: use_scaled_rope is not supported: no multi-token checkpoint of Meta's uses it")
        for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
            if name not in tensors or tensors[name].dim() != 2:
                raise FileError(f"{file.parent}: the tensor {name} is missing or no matrix")
        horizon, layers, heads = int(number("n_future_tokens", 1)), int(number("n_layers")), int(number("n_heads"))
        if layers < horizon:
            raise FileError(
                f"{file}: n_layers = {layers} counts every head, and so cannot be under n_future_tokens = {horizon}"
            )
        vocab_size = params.get("vocab_size")
        shape = _Shape(
            dim=int(number("dim")),
            blocks=layers - horizon + 1,
            horizon=horizon,
            heads=heads,
            kv_heads=int(number("n_kv_heads", heads)),
            ffn=tensors["layers.0.feed_forward.w1.weight"].shape[0],
            # Meta's tools write −1 for "as the tokenizer says"
            vocab_size=vocab_size if vocab_size and vocab_size > 0 else tensors["tok_embeddings.weight"].shape[0],
            norm_eps=float(number("norm_eps", 1e-5)),
            rope_theta=float(number("rope_theta", 10000.0)),
            max_positions=self._max_positions or int(number("max_seq_len", 4096)),
        )
        if shape.dim % (2 * heads) or heads % shape.kv_heads:
            raise FileError(
                f"{file}: dim = {shape.dim}, n_heads = {heads} and n_kv_heads = {shape.kv_heads} do not go together"
            )
        return shape


def _weights(folder: Path) -> Path:
    single = folder / "consolidated.pth"
    if single.is_file():
        return single
    shards = sorted(folder.glob("consolidated.*.pth"))
    if len(shards) == 1:
        return shards[0]
    if shards:
        raise FileError(
            f"{folder}: {len(shards)} tensor-parallel shards ({shards[0].name} …) are not supported; merge them into one "
            "consolidated.pth first"
        )
    raise FileError(f"{folder}: holds no consolidated.pth")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in read_bin(file).items() if name != _COMPUTED}


def _expected(shape: _Shape) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, by Meta's names."""
    dim, ffn, kv = shape.dim, shape.ffn, shape.kv_heads * shape.head_dim
    block = {
        "attention.wq": (dim, dim),
        "attention.wk": (kv, dim),
        "attention.wv": (kv, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (ffn, dim),
        "feed_forward.w2": (dim, ffn),
        "feed_forward.w3": (ffn, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    expected: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (shape.vocab_size, dim),
        "norm.weight": (dim,),
        "output.weight": (shape.vocab_size, dim),
    }
    for group, count in (("layers", shape.blocks), ("extra_heads", shape.horizon - 1)):
        for index in range(count):
            expected |= {f"{group}.{index}.{part}.weight": size for part, size in block.items()}
    return expected


def _rotate_half_rows(part: str, tensor: Tensor, shape: _Shape) -> Tensor:
    """Reorder rows from Meta's rotary layout to that of transformers.

    Meta rotates neighbouring pairs of a head's numbers, transformers its two halves.
    """
    if part not in ("attention.wq", "attention.wk"):
        return tensor
    rows, dim = tensor.shape
    return tensor.view(rows // shape.head_dim, shape.head_dim // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def _config(shape: _Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        # the layout does not say how a text begins and ends: that is the tokenizer's matter
        bos_token_id=None,
        eos_token_id=None,
    )


def _heads(shape: _Shape) -> HeadsConfig | None:
    return HeadsConfig(kind="block", horizon=shape.horizon) if shape.horizon > 1 else None
