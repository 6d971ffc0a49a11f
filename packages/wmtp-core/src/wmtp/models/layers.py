"""Repeated layers of a model with heads, in call order.

Activation checkpointing, compilation and sharding work on one of them at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["repeated_layers"]


def repeated_layers(model: MTPModel) -> list[nn.Module]:
    """List the layer-sized modules that a forward pass calls one after another.

    Args:
        model: with any heads.

    Returns:
        the decoder layers of the trunk, the last layer (head 1's), and the module of each extra head, in the order in which
        they are called; none holds another. Embeddings and unembeddings are not among them: those of linear heads, and of a
        native layer with copies of its own. The loss multiplies by an unembedding outside of any module.
    """
    return [*model.anatomy.layers, *(head for head in model.extra_heads if not isinstance(head, nn.Linear | nn.Embedding))]
