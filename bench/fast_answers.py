"""Greedy decoding of thousands of Llama rows, one graph a step.

`wmtp distill-data` serves every architecture, ends rows one by one and may sample; on a small model its many small kernels take
the time. This writes what a set of millions of tokens needs and nothing else: rows of one length, joined projections, no row
leaves before the last token, and the CPU is asked for nothing in between. The tokens are the model's own, but for rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel

__all__ = ["Rows", "Weights", "cut", "write"]

_MULTIPLE = 16
#: rows of prompts that are read at once
_PROMPTS = 512


@frozen(kw_only=True, eq=False)
class Weights:
    """Weights of a Llama, with projections of the same input joined.

    Args:
        embedding, unembedding: ``[V, D]``.
        layers: of each both norms, and the weights of queries, keys and values, of the output, of gate and up, and of down.
        norm: the final one.
        turns: ``[positions, 2, d]``, cosines and sines of the rotary embedding.
        heads, shared: query heads, and heads of keys and values.
        eps: of the norms.
    """

    embedding: Tensor
    unembedding: Tensor
    layers: list[tuple[Tensor, ...]]
    norm: Tensor
    turns: Tensor
    heads: int
    shared: int
    eps: float

    @classmethod
    def of(cls, base: PreTrainedModel, dtype: torch.dtype, positions: int = 1024) -> Weights:
        """Copy them in another precision."""
        if not isinstance(base, LlamaForCausalLM):
            raise SystemExit(f"{type(base).__name__}: fast_answers is for a Llama; leave --answer-seconds out")
        inner: Any = base.model
        config: Any = base.config

        def joined(*linears: Any) -> Tensor:
            if any(linear.bias is not None for linear in linears):
                raise SystemExit("fast_answers is for a Llama without biases; leave --answer-seconds out")
            return torch.cat([linear.weight.detach() for linear in linears]).to(dtype)

        layers = []
        for layer in inner.layers:
            of, mlp = layer.self_attn, layer.mlp
            norms = layer.input_layernorm.weight.detach().to(dtype), layer.post_attention_layernorm.weight.detach().to(dtype)
            qkv, gate_up = joined(of.q_proj, of.k_proj, of.v_proj), joined(mlp.gate_proj, mlp.up_proj)
            layers.append((*norms, qkv, joined(of.o_proj), gate_up, joined(mlp.down_proj)))
        device = inner.embed_tokens.weight.device
        angles = torch.arange(positions, device=device)[:, None] * inner.rotary_emb.inv_freq.float()[None]
        turns = torch.stack([angles.cos(), angles.sin()], dim=1).repeat(1, 1, 2).to(dtype)
        return cls(
            embedding=inner.embed_tokens.weight.detach().to(dtype),
            unembedding=base.lm_head.weight.detach().to(dtype),
            layers=layers,
            norm=inner.norm.weight.detach().to(dtype),
            turns=turns,
            heads=config.num_attention_heads,
            shared=config.num_key_value_heads,
            eps=config.rms_norm_eps,
        )


class Rows:
    """Rows decoded together, for prompts of up to ``prompt`` tokens.

    Args:
        weights: of the model.
        rows: their number.
        prompt: the longest prompt; shorter ones stand on the right.
        new: tokens that every row gets.
    """

    def __init__(self, weights: Weights, rows: int, prompt: int, new: int) -> None:
        self._w, self._prompt, self._new = weights, prompt, new
        like = weights.embedding
        self._slots = -(-(prompt + new) // _MULTIPLE) * _MULTIPLE
        width = len(weights.turns[0, 0])
        kept = (2, len(weights.layers), rows, weights.shared, self._slots, width)
        self._keys, self._values = like.new_zeros(kept)
        self._bias = like.new_zeros(rows, 1, 1, self._slots)
        self._token, self._position = (torch.zeros(rows, dtype=torch.int64, device=like.device) for _ in range(2))
        self._slot, self._place = (torch.zeros(1, dtype=torch.int64, device=like.device) for _ in range(2))
        self.tokens = torch.zeros(rows, new, dtype=torch.int64, device=like.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if like.is_cuda:
            self._capture()

    def run(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Continue at most as many prompts as there are rows.

        Returns ``[rows, new]``, which the next call writes again.
        """
        self._read(prompts)
        for _ in range(self._new - 1):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        return self.tokens

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            print(f"no graph of a step, which takes several times as long now: {error}", flush=True)
            return
        self._graph = graph

    def _read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts in parts, and choose the first token."""
        rows, length = len(self._token), self._prompt
        ids = torch.zeros(rows, length, dtype=torch.int64)
        lengths = torch.ones(rows, dtype=torch.int64)
        for row, given in enumerate(prompts):
            ids[row, length - len(given) :] = torch.as_tensor(given, dtype=torch.int64)
            lengths[row] = len(given)
        device = self._token.device
        ids, lengths = ids.to(device), lengths.to(device)
        places = torch.arange(length, device=device)
        padding = places < (length - lengths)[:, None]
        self._bias.fill_(-torch.inf)
        self._bias[:, 0, 0, :length] = torch.where(padding, -torch.inf, 0.0).to(self._bias.dtype)
        causal = places[:, None] >= places
        own = places[:, None] == places
        for start in range(0, rows, _PROMPTS):
            part = slice(start, start + _PROMPTS)
            allowed = (causal & ~padding[part, None]) | own  # padding sees itself: a row that sees nothing is NaN
            mask = torch.where(allowed, 0.0, -torch.inf).to(self._bias.dtype)[:, None]
            positions = (places - (length - lengths[part])[:, None]).clamp(min=0)
            hidden = self._layers(ids[part], positions, mask, part)[:, -1]
            self._token[part] = F.linear(hidden, self._w.unembedding).argmax(-1)
        self._position.copy_(lengths)
        self._slot.fill_(length)
        self._place.fill_(1)
        self.tokens[:, 0] = self._token

    def _step(self) -> None:
        self._bias.index_fill_(3, self._slot, 0.0)
        hidden = self._layers(self._token[:, None], self._position[:, None], self._bias, None)[:, 0]
        self._token.copy_(F.linear(hidden, self._w.unembedding).argmax(-1))
        self.tokens.index_copy_(1, self._place, self._token[:, None])
        for counter in (self._position, self._slot, self._place):
            counter += 1

    def _layers(self, ids: Tensor, positions: Tensor, mask: Tensor, part: slice | None) -> Tensor:
        """Run all layers: ``[n, T]`` to ``[n, T, D]``.

        ``part`` of the rows reads a prompt; with None all read one token more.
        """
        w = self._w
        x = F.embedding(ids, w.embedding)
        rows, length, size = x.shape
        cos, sin = w.turns[positions].unsqueeze(1).unbind(3)  # [n, 1, T, d] each
        grouped = w.heads // w.shared
        for number, (norm_in, norm_out, qkv, output, gate_up, down) in enumerate(w.layers):
            found = F.linear(F.rms_norm(x, (size,), norm_in, w.eps), qkv)
            split = found.view(rows, length, w.heads + 2 * w.shared, -1).transpose(1, 2)
            turned = _turned(split[:, : w.heads + w.shared], cos, sin)
            query, key, value = turned[:, : w.heads], turned[:, w.heads :], split[:, w.heads + w.shared :]
            keys, values = self._keys[number], self._values[number]
            if part is None:
                keys.index_copy_(2, self._slot, key)
                values.index_copy_(2, self._slot, value)
                query = query.reshape(rows, w.shared, grouped, -1)
                attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            else:
                keys[part, :, :length], values[part, :, :length] = key, value
                key, value = key.repeat_interleave(grouped, 1), value.repeat_interleave(grouped, 1)
                attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
            x = x + F.linear(attended.reshape(rows, length, -1), output)
            gate, up = F.linear(F.rms_norm(x, (size,), norm_out, w.eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.rms_norm(x, (size,), w.norm, w.eps)


class _Written:
    """Tokens on their way from the device."""

    def __init__(self, numbers: list[int], tokens: Tensor) -> None:
        self.numbers = numbers
        self._here = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
        self._here.copy_(tokens, non_blocking=True)
        self._arrived = torch.cuda.Event() if tokens.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def tokens(self) -> list[list[int]]:
        """Wait for them, and for nothing that was begun later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here.tolist()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@torch.no_grad()
def write(
    weights: Weights, prompts: Sequence[Sequence[int]], *, rows: int, new: int, lengths: Sequence[int]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Continue prompts by ``new`` tokens each.

    Yields the numbers of some prompts and their tokens.

    A batch is on its way while the one before it is yielded, so what the caller does with text costs no time.

    Args:
        weights: of the model.
        prompts: token ids, in the order in which batches are filled.
        rows: of a batch.
        new: tokens of each answer.
        lengths: of prompts; a prompt is padded to the first that it fits. Longer ones are left out.
    """
    kept: dict[int, Rows] = {}
    filled: dict[int, list[int]] = {length: [] for length in lengths}
    before: _Written | None = None

    def started(length: int) -> _Written:
        numbers, filled[length] = filled[length], []
        if length not in kept:
            kept[length] = Rows(weights, rows, length, new)
        return _Written(numbers, kept[length].run([prompts[number] for number in numbers])[: len(numbers)])

    def batches() -> Iterator[int]:
        for number, prompt in enumerate(prompts):
            length = next((length for length in lengths if len(prompt) <= length), None)
            if length is not None:
                filled[length].append(number)
                if len(filled[length]) == rows:
                    yield length
        yield from (length for length, numbers in filled.items() if numbers)

    for length in batches():
        now = started(length)
        if before is not None:
            yield before.numbers, before.tokens()
        before = now
    if before is not None:
        yield before.numbers, before.tokens()


def cut(tokens: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """Cut an answer before its end token; and whether it had one."""
    place = next((place for place, token in enumerate(tokens) if token in ends), None)
    return list(tokens[:place]), place is not None
