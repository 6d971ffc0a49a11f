"""Chains of heads, each fed by the one before it.

A step reads the hidden states of the one before and the embedding of the token that it predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from wmtp.models.native.layouts import ChainRule

if TYPE_CHECKING:
    from wmtp.models.anatomy import LayerCall
    from wmtp.models.heads import HeadInput, Maker

__all__ = ["ChainedBlock", "blocks_of", "embeddings_of", "run_chain", "step_embedding", "unembeddings_of"]


class ChainedBlock(nn.Module):
    """One module of a chain: ``norm(layer(projection([norm(previous); norm(embedding)])))``.

    Args:
        rule: the order of the projection's halves, and which norm follows.
        hidden_norm: of the previous step's hidden states.
        embedding_norm: of the token's embedding.
        projection: from 2D to D.
        layer: a decoder layer.
        output_norm: where the rule says ``own``.
    """

    def __init__(
        self,
        rule: ChainRule,
        hidden_norm: nn.Module,
        embedding_norm: nn.Module,
        projection: nn.Linear,
        layer: nn.Module,
        output_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.hidden_norm = hidden_norm
        self.embedding_norm = embedding_norm
        self.projection = projection
        self.layer = layer
        self.output_norm = output_norm

    def forward(self, previous: Tensor, embedding: Tensor, call: LayerCall) -> Tensor:
        """Run one step: ``[B, S, D]`` twice to ``[B, S, D]``.

        The model's final norm, where the rule asks for it, is still to come.
        """
        parts = [self.hidden_norm(previous), self.embedding_norm(embedding)]
        joined = torch.cat(parts[::-1] if self.rule.embedding_first else parts, dim=-1)
        hidden = call.repeat(self.layer, self.projection(joined))
        return hidden if self.output_norm is None else self.output_norm(hidden)

    @classmethod
    def make(cls, maker: Maker, rule: ChainRule, layer: nn.Module | None = None) -> ChainedBlock:
        """Make a new module.

        ``copy`` starts the projection as a copy of the hidden states, blind to the embedding.

        Args:
            maker: of its parts.
            rule: how it computes.
            layer: its decoder layer. Default: a new one like the model's last.
        """
        size = maker.anatomy.hidden_size
        projection = maker.linear(2 * size, size, bias=False)
        if maker.init == "copy":
            with torch.no_grad():
                projection.weight.zero_()
                projection.weight[:, size if rule.embedding_first else 0 :][:, :size].fill_diagonal_(1.0)
        norms = maker.norm(), maker.norm()
        layer = maker.layer() if layer is None else layer
        return cls(rule, *norms, projection, layer, maker.final_norm() if rule.output == "own" else None)


def blocks_of(heads: nn.ModuleList, extra: int) -> list[ChainedBlock]:
    """List the module of each of ``extra`` steps.

    Where there are fewer modules, they take turns, as in vLLM.
    """
    blocks = [head for head in heads if isinstance(head, ChainedBlock)]
    return [blocks[step % len(blocks)] for step in range(extra)] if blocks else []


def embeddings_of(heads: nn.ModuleList, extra: int) -> list[nn.Embedding | None]:
    """List the embedding of each of ``extra`` steps; None: the model's."""
    return cast("list[nn.Embedding | None]", _turns(heads, nn.Embedding, extra))


def unembeddings_of(heads: nn.ModuleList, extra: int) -> list[nn.Linear | None]:
    """List the unembedding of each of ``extra`` steps; None: the model's."""
    return cast("list[nn.Linear | None]", _turns(heads, nn.Linear, extra))


def step_embedding(rule: ChainRule, ahead: int, embedding: Tensor, positions: Tensor) -> Tensor:
    """Return what a step reads of the tokens' embeddings.

    Args:
        rule: of its module.
        ahead: 1 for the first step.
        embedding: ``[B, S, D]``.
        positions: ``[B, S]`` or ``[1, S]``, of the hidden states that it reads, in their document.
    """
    if not rule.zero_first or ahead > 1:
        return embedding
    return embedding.masked_fill((positions == 0)[..., None], 0.0)


def run_chain(heads: nn.ModuleList, given: HeadInput, extra: int) -> list[Tensor]:
    """Run the steps of a chain; see `HeadKind.run`."""
    hidden: list[Tensor] = []
    steps = zip(blocks_of(heads, extra), embeddings_of(heads, extra), strict=True)
    for ahead, (block, own) in enumerate(steps, start=1):
        previous = hidden[-1] if hidden else (given.raw if block.rule.before_norm else given.hidden)
        embed: Callable[[Tensor], Tensor] = given.embed if own is None else own
        embedding = step_embedding(block.rule, ahead, embed(given.input_ids.roll(-ahead, dims=1)), given.positions)
        result = block(previous, embedding, given.call)
        hidden.append(given.final_norm(result) if block.rule.output == "model" else result)
    return hidden


def _turns(heads: nn.ModuleList, kind: type[nn.Module], extra: int) -> Sequence[nn.Module | None]:
    found = [head for head in heads if isinstance(head, kind)]
    return [found[step % len(found)] for step in range(extra)] if found else [None] * extra
