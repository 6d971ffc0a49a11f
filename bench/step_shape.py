"""Model and the data that every row of ``bench/step.py`` trains."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor
from transformers import LlamaConfig


@frozen(kw_only=True)
class Shape:
    """A Llama with block heads, and a batch.

    Args:
        vocab, hidden, layers, ffn, attention_heads, kv_heads: of the model; ``layers`` with the last one, head 1's.
        horizon: H; each head beyond the first has a layer more.
        length: tokens of a row.
        batch: rows of a step.
    """

    vocab: int
    hidden: int
    layers: int
    ffn: int
    attention_heads: int
    kv_heads: int
    horizon: int
    length: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    @property
    def operations(self) -> float:
        """Floating-point operations a token needs, forward and backward."""
        width, kv = self.hidden, self.hidden * self.kv_heads // self.attention_heads
        layer = 2 * width * (width + kv) + 3 * width * self.ffn
        attention = self.length * width  # a product of queries and keys and one of probabilities and values, half of each
        layers = self.layers + self.horizon - 1
        return 6.0 * (layers * (layer + attention) + self.horizon * self.vocab * width)

    def config(self) -> LlamaConfig:
        """Configuration of transformers."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.ffn,
            num_attention_heads=self.attention_heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=max(self.length, 2048),
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            use_cache=False,
        )

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """Token ids and weights of a step, ``[B, S]`` on the CPU."""
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(0, self.vocab, (self.batch, self.length), generator=draw)
        return ids, torch.rand(self.batch, self.length, generator=draw) + 0.1
