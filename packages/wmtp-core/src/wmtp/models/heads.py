"""Kinds of heads 2..H. Head 1 is the model's own and not here.

A kind is one class: ``build`` makes its modules, and ``run`` turns the trunk and head 1's hidden states into those of heads
2..H. All hidden states that it returns are ready for an unembedding: they come after the final norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from wmtp.errors import WMTPError
from wmtp.models.anatomy import Anatomy, LayerCall

__all__ = ["HEAD_KINDS", "HeadInput", "HeadKind", "Maker"]

M = TypeVar("M", bound=nn.Module)


@frozen(kw_only=True, eq=False)
class HeadInput:
    """Inputs of heads 2..H.

    Args:
        call: the arguments of the last decoder layer; its hidden states are the trunk's output ``[B, S, D]``.
        trunk: ``[B, S, D]``; detached where the heads must not train the trunk.
        hidden: ``[B, S, D]``, head 1's hidden states; detached likewise.
        input_ids: ``[B, S]``.
        embed: from token ids to embeddings ``[B, S, D]``; without gradient likewise.
        final_norm: the model's own final norm; its parameters are without gradient likewise.
    """

    call: LayerCall
    trunk: Tensor
    hidden: Tensor
    input_ids: Tensor
    embed: Callable[[Tensor], Tensor]
    final_norm: Callable[[Tensor], Tensor]


@frozen(kw_only=True, eq=False)
class Maker:
    """Makes the modules of new heads in the likeness of the model's own.

    Args:
        base: the model.
        anatomy: its parts.
        init: ``copy`` or ``random``.
    """

    base: PreTrainedModel
    anatomy: Anatomy
    init: str

    def layer(self) -> nn.Module:
        """A decoder layer: the last one's copy, or one from the model's own initialiser."""
        layer = self._duplicate(self.anatomy.layers[-1])
        return self.initialise(layer) if self.init == "random" else layer

    def norm(self) -> nn.Module:
        """A fresh norm of the kind of the model's final one (RMS norm where it has none)."""
        if self.anatomy.tail:
            return self.initialise(self._duplicate(self.anatomy.tail[0]))
        return self._placed(nn.RMSNorm(self.anatomy.hidden_size))

    def linear(self, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
        """A linear map from the model's own initialiser."""
        return self.initialise(nn.Linear(inputs, outputs, bias=bias))

    def initialise(self, module: M) -> M:
        """Give every parameter of ``module`` a new value from the model's own initialiser."""
        if self.anatomy.output.weight.is_meta:  # the numbers come from another process
            return self._placed(module)
        # drawn on the CPU, so that a seed gives the same heads on every device
        module.cpu()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(torch.nan)
            # children first, as transformers does: some models scale a child's weights in the parent's turn
            module.apply(self.base._init_weights)
        for name, parameter in module.named_parameters():
            if parameter.isnan().any():
                raise WMTPError(
                    f"the initialiser of {type(self.base).__name__} gives {type(module).__name__}.{name} no value; "
                    'set models.base.heads.init = "copy"'
                )
        return self._placed(module)

    def _duplicate(self, module: nn.Module) -> nn.Module:
        # layers hold the model's config: sharing it keeps a later change (of the attention kernel, say) in step
        config = self.base.config
        return copy.deepcopy(module, {id(config): config}).requires_grad_(True)

    def _placed(self, module: M) -> M:
        weight = self.anatomy.output.weight
        return module.to(device=weight.device, dtype=weight.dtype)


class HeadKind:
    """One kind of extra heads."""

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """Build the modules of ``extra`` new heads."""
        raise NotImplementedError

    @staticmethod
    def run(heads: nn.ModuleList, given: HeadInput, extra: int) -> list[Tensor]:
        """Hidden states of heads 2..``extra`` + 1, ``[B, S, D]`` each."""
        raise NotImplementedError


class Block(HeadKind):
    """A decoder layer each on the trunk, side by side; final norm and unembedding shared (Meta, arXiv 2404.19737, §2)."""

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """See `HeadKind.build`."""
        return nn.ModuleList(maker.layer() for _ in range(extra))

    @staticmethod
    def run(heads: nn.ModuleList, given: HeadInput, extra: int) -> list[Tensor]:
        """See `HeadKind.run`."""
        return [given.final_norm(given.call.repeat(head, given.trunk)) for head in heads[:extra]]


class Linear(HeadKind):
    """An unembedding ``[V, D]`` each on head 1's hidden states (the parallel linear heads of arXiv 2404.19737, table S4)."""

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """See `HeadKind.build`."""
        own = maker.anatomy.output
        heads = nn.ModuleList(maker.linear(own.in_features, own.out_features, bias=own.bias is not None) for _ in range(extra))
        if maker.init == "copy":
            for head in heads:
                head.load_state_dict(own.state_dict())
        return heads

    @staticmethod
    def run(heads: nn.ModuleList, given: HeadInput, extra: int) -> list[Tensor]:
        """See `HeadKind.run`."""
        return [given.hidden] * extra


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        return x + F.silu(self.linear(x))


class Residual(HeadKind):
    """A residual SiLU layer each on head 1's hidden states, then the shared unembedding (Medusa, arXiv 2401.10774, §2.1).

    Medusa gives each head an unembedding of its own as well; here it is shared. ``copy`` starts with W = 0 as Medusa does: the
    identity, so that every head first predicts what head 1 does.
    """

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """See `HeadKind.build`."""
        size = maker.anatomy.hidden_size
        heads = nn.ModuleList(ResidualBlock(maker.linear(size, size, bias=True)) for _ in range(extra))
        if maker.init == "copy":
            for parameter in heads.parameters():
                nn.init.zeros_(parameter)
        return heads

    @staticmethod
    def run(heads: nn.ModuleList, given: HeadInput, extra: int) -> list[Tensor]:
        """See `HeadKind.run`."""
        return [head(given.hidden) for head in heads[:extra]]


class ChainedBlock(nn.Module):
    """One depth of a chain: ``layer(projection([norm(previous); norm(embedding)]))``.

    Args:
        hidden_norm: of the previous depth's hidden states.
        embedding_norm: of the token's embedding.
        projection: from 2D to D.
        layer: a decoder layer.
    """

    def __init__(self, hidden_norm: nn.Module, embedding_norm: nn.Module, projection: nn.Linear, layer: nn.Module) -> None:
        super().__init__()
        self.hidden_norm = hidden_norm
        self.embedding_norm = embedding_norm
        self.projection = projection
        self.layer = layer

    def forward(self, previous: Tensor, embedding: Tensor, call: LayerCall) -> Tensor:
        """``[B, S, D]`` twice to ``[B, S, D]``, before the final norm."""
        joined = torch.cat([self.hidden_norm(previous), self.embedding_norm(embedding)], dim=-1)
        return call.repeat(self.layer, self.projection(joined))

    @classmethod
    def make(cls, maker: Maker) -> ChainedBlock:
        """A new one. ``copy`` starts the projection as a copy of the hidden states, blind to the embedding."""
        size = maker.anatomy.hidden_size
        projection = maker.linear(2 * size, size, bias=False)
        if maker.init == "copy":
            with torch.no_grad():
                projection.weight.zero_()
                projection.weight[:, :size].fill_diagonal_(1.0)
        return cls(maker.norm(), maker.norm(), projection, maker.layer())


class Chained(HeadKind):
    """A chain: head k reads the hidden states of head k−1 and the embedding of token t+k−1 (DeepSeek-V3,
    arXiv 2412.19437, §2.2).

    At training the token is the real one, at inference the one that head k−1 predicted. Beyond the row's end the row's
    beginning is read, beyond a document's end the next document: no prediction made there is valid.
    """

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """See `HeadKind.build`."""
        return nn.ModuleList(ChainedBlock.make(maker) for _ in range(extra))

    @staticmethod
    def run(heads: nn.ModuleList, given: HeadInput, extra: int) -> list[Tensor]:
        """See `HeadKind.run`."""
        return _run_chain([heads[k] for k in range(extra)], given)


class Shared(HeadKind):
    """A chain whose every depth is the same module, applied H−1 times (FastMTP, arXiv 2509.18362, §3)."""

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """See `HeadKind.build`."""
        return nn.ModuleList([ChainedBlock.make(maker)] if extra else [])

    @staticmethod
    def run(heads: nn.ModuleList, given: HeadInput, extra: int) -> list[Tensor]:
        """See `HeadKind.run`."""
        return _run_chain([heads[0]] * extra, given) if extra else []


def _run_chain(blocks: list[nn.Module], given: HeadInput) -> list[Tensor]:
    hidden = [given.hidden]
    for ahead, block in enumerate(blocks, start=1):
        embedding = given.embed(given.input_ids.roll(-ahead, dims=1))
        hidden.append(given.final_norm(block(hidden[-1], embedding, given.call)))
    return hidden[1:]


#: the kinds by their name in TOML
HEAD_KINDS: dict[str, type[HeadKind]] = {
    "block": Block,
    "linear": Linear,
    "residual": Residual,
    "chained": Chained,
    "shared": Shared,
}
