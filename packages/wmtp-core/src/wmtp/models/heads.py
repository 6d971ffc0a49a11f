"""Kinds of heads 2..H.

Head 1 is the model's own and not here. A kind is one class: ``build`` makes its modules, and ``run`` turns the trunk and head
1's hidden states into those of heads 2..H. All hidden states that it returns are ready for an unembedding: they come after the
final norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from wmtp.errors import WMTPError
from wmtp.models.anatomy import Anatomy, LayerCall
from wmtp.models.chains import ChainedBlock, run_chain, unembeddings_of
from wmtp.models.native.found import Native
from wmtp.models.native.layouts import layout_named, rule_of

__all__ = ["HEAD_KINDS", "HeadInput", "HeadKind", "Maker"]

M = TypeVar("M", bound=nn.Module)


@frozen(kw_only=True, eq=False)
class HeadInput:
    """Inputs of heads 2..H.

    Args:
        call: the arguments of the last decoder layer; its hidden states are the trunk's output ``[B, S, D]``.
        trunk: ``[B, S, D]``; detached where the heads must not train the trunk.
        hidden: ``[B, S, D]``, head 1's hidden states; detached likewise.
        raw: ``[B, S, D]``, the last layer's output, before the final norm; detached likewise.
        input_ids: ``[B, S]``.
        positions: ``[B, S]`` or ``[1, S]``, counted from 0 in each document.
        embed: from token ids to embeddings ``[B, S, D]``; without gradient likewise.
        final_norm: the model's own final norm; its parameters are without gradient likewise.
    """

    call: LayerCall
    trunk: Tensor
    hidden: Tensor
    raw: Tensor
    input_ids: Tensor
    positions: Tensor
    embed: Callable[[Tensor], Tensor]
    final_norm: Callable[[Tensor], Tensor]


@frozen(kw_only=True, eq=False)
class Maker:
    """Factory of the modules of new heads, like the model's own.

    Args:
        base: the model.
        anatomy: its parts.
        init: ``copy`` or ``random``.
        layout: what `chained` and `shared` heads are fed: see ``models.base.heads.layout``.
        native: the model's own layers for multi-token prediction, where heads are made of these.
        dtype: of the heads' parameters. Default: that of the model's.
    """

    base: PreTrainedModel
    anatomy: Anatomy
    init: str
    layout: str = "mimo"
    native: Native | None = None
    dtype: torch.dtype | None = None

    def layer(self) -> nn.Module:
        """Make a decoder layer.

        It is a copy of the last one, or one from the model's own initializer.
        """
        layer = self._duplicate(self.anatomy.layers[-1])
        return self.initialize(layer) if self.init == "random" else layer

    def layer_like(self, template: str) -> nn.Module:
        """Copy the model's ``first`` or ``last`` decoder layer."""
        return self._duplicate(self.anatomy.layers[0 if template == "first" else -1])

    def final_norm(self) -> nn.Module:
        """Make a head's own norm in place of the final one.

        It is a copy of that, or a new one.
        """
        if self.init == "random" or not self.anatomy.tail:
            return self.norm()
        copies = [self._duplicate(module) for module in self.anatomy.tail]
        return copies[0] if len(copies) == 1 else nn.Sequential(*copies)

    def norm(self) -> nn.Module:
        """Make a new norm like the model's final one; default RMS norm."""
        if self.anatomy.tail:
            return self.initialize(self._duplicate(self.anatomy.tail[0]))
        return self._placed(nn.RMSNorm(self.anatomy.hidden_size))

    def linear(self, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
        """A linear map from the model's own initializer."""
        return self.initialize(nn.Linear(inputs, outputs, bias=bias))

    def initialize(self, module: M) -> M:
        """Initialize every parameter of ``module`` by the model's own initializer."""
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
                    f"the initializer of {type(self.base).__name__} gives {type(module).__name__}.{name} no value; "
                    'set models.base.heads.init = "copy"'
                )
        return self._placed(module)

    def _duplicate(self, module: nn.Module) -> nn.Module:
        # layers hold the model's config: sharing it keeps a later change (of the attention kernel, say) in step
        config = self.base.config
        copied = copy.deepcopy(module, {id(config): config}).requires_grad_(True)
        return copied if self.dtype is None else copied.to(self.dtype)

    def _placed(self, module: M) -> M:
        weight = self.anatomy.output.weight
        return module.to(device=weight.device, dtype=self.dtype or weight.dtype)


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

    @staticmethod
    def unembeddings(heads: nn.ModuleList, extra: int) -> list[nn.Linear | None]:
        """List the unembedding of each of ``extra`` heads; None: the model's."""
        return [None] * extra


class Block(HeadKind):
    """Decoder layer on the trunk for each head.

    Final norm and unembedding are shared. Meta, arXiv 2404.19737, §2.
    """

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """See `HeadKind.build`."""
        return nn.ModuleList(maker.layer() for _ in range(extra))

    @staticmethod
    def run(heads: nn.ModuleList, given: HeadInput, extra: int) -> list[Tensor]:
        """See `HeadKind.run`."""
        return [given.final_norm(given.call.repeat(head, given.trunk)) for head in heads[:extra]]


class Linear(HeadKind):
    """Unembedding ``[V, D]`` for each head, on head 1's hidden states.

    The parallel linear heads of arXiv 2404.19737, table S4.
    """

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

    @staticmethod
    def unembeddings(heads: nn.ModuleList, extra: int) -> list[nn.Linear | None]:
        """See `HeadKind.unembeddings`."""
        return [cast(nn.Linear, head) for head in heads[:extra]]


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        return x + F.silu(self.linear(x))


class Residual(HeadKind):
    """Residual SiLU layer for each head, on head 1's hidden states.

    Medusa (arXiv 2401.10774, §2.1) gives each head an unembedding of its own as well; here it is shared. ``copy`` starts with W
    = 0 as Medusa does: the identity, so that every head first predicts what head 1 does.
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


class Chained(HeadKind):
    """Chain of decoder layers, each fed by the one before.

    Head k reads the hidden states of head k−1 and the embedding of token t+k−1 (DeepSeek-V3, arXiv 2412.19437, §2.2). In
    training the token is the real one, at inference the one that head k−1 predicted. Beyond the row's end the row's beginning
    is read, beyond a document's end the next document: no prediction made there is valid.
    """

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """See `HeadKind.build`."""
        return nn.ModuleList(ChainedBlock.make(maker, rule_of(maker.layout)) for _ in range(extra))

    @staticmethod
    def run(heads: nn.ModuleList, given: HeadInput, extra: int) -> list[Tensor]:
        """See `HeadKind.run`."""
        return run_chain(heads, given, extra)


class Shared(Chained):
    """Chain that repeats one module (FastMTP, arXiv 2509.18362, §3)."""

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """See `HeadKind.build`."""
        return nn.ModuleList([ChainedBlock.make(maker, rule_of(maker.layout))] if extra else [])


class NativeKind(Chained):
    """Native layers: the model's own for multi-token prediction.

    With fewer modules than heads, they take turns. The modules come first, then their own embeddings and unembeddings, where
    they have any: these belong to the root when processes share a model, as the loss multiplies by an unembedding outside of
    any module.
    """

    @staticmethod
    def build(maker: Maker, extra: int) -> nn.ModuleList:
        """See `HeadKind.build`. All numbers come from the folder."""
        if maker.native is None:
            raise WMTPError("heads of kind 'native' are the model's own, and this model has none")
        native, layout = maker.native, layout_named(maker.native.layout)
        count, (rows, size) = native.modules, maker.anatomy.output.weight.shape
        parts: list[nn.Module] = [
            ChainedBlock.make(maker, layout.rule, maker.layer_like(layout.template)) for _ in range(count)
        ]
        if native.own_embedding:
            parts += [maker.initialize(nn.Embedding(rows, size)) for _ in range(count)]
        if native.own_unembedding:
            parts += [maker.linear(size, rows, bias=False) for _ in range(count)]
        return nn.ModuleList(parts)

    @staticmethod
    def unembeddings(heads: nn.ModuleList, extra: int) -> list[nn.Linear | None]:
        """See `HeadKind.unembeddings`."""
        return unembeddings_of(heads, extra)


#: the kinds by their name in TOML
HEAD_KINDS: dict[str, type[HeadKind]] = {
    "block": Block,
    "linear": Linear,
    "residual": Residual,
    "chained": Chained,
    "shared": Shared,
    "native": NativeKind,
}
