"""A causal language model that predicts the next H tokens at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from attrs import evolve
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError, WMTPError
from wmtp.models.adapter_folder import write_adapter
from wmtp.models.adapter_names import is_adapter_name
from wmtp.models.adapters import Adapter, merge
from wmtp.models.anatomy import Anatomy, Unembedding, dissect, first_tensor, record_call, record_output
from wmtp.models.attention import causal_mask, document_mask, use_block_attention
from wmtp.models.config_fields import max_positions
from wmtp.models.documents import reading
from wmtp.models.drawing import seeded
from wmtp.models.generating import Generating
from wmtp.models.heads import HEAD_KINDS, HeadInput, Maker
from wmtp.models.heads_folder import describe_heads, load_heads, remove_heads, write_heads
from wmtp.models.native.found import Native
from wmtp.models.native.layouts import layout_named, served_layout
from wmtp.models.native.tensors import folder_tensors
from wmtp.models.packing import Packing, find_packing
from wmtp.models.saving import write_base
from wmtp.models.untouched import Untouched

if TYPE_CHECKING:
    from wmtp.tokenizers import Tokenizer

__all__ = ["MTPModel", "MTPOutput"]


class MTPOutput(NamedTuple):
    """Output of the model, short of logits.

    Args:
        trunk: ``[B, S, D]``, the output of all decoder layers but the last.
        hidden: H tensors ``[B, S, D]``, after the final norm: the inputs of each head's unembedding.
        router_logits: of each layer with experts ``[B · S, E]``, where they were asked for.
    """

    trunk: Tensor
    hidden: tuple[Tensor, ...]
    router_logits: tuple[Tensor, ...] = ()


class MTPModel(Generating, nn.Module):
    """Decoder-only Hugging Face model with extra heads for tokens t+2 … t+H.

    Head 1 is the model itself: its logits are the model's bit for bit. No logits are made in `forward`; the loss multiplies
    hidden states and unembedding in chunks, so that nothing of shape ``[B, S, H, V]`` is ever there. The model is meant to
    run in eval mode, in training too: dropout is a choice of pretraining.

    Args:
        base: the model. Nothing in it is replaced.
        heads: how many heads, of which kind, and whether they train the trunk. With ``trunk_gradient = "detach"`` heads 2..H
            give no gradient to any parameter of the base: it learns exactly as it does with head 1 alone.
        head_state: the tensors of `extra_heads`, from a file; None makes new heads as ``heads.init`` says.
        seed: of new heads; the global random state stays as it is.
        precomputed: what there is to find out about ``base`` (its anatomy, and how rows hold several documents), where it
            is on the meta device and cannot be tried out. See `wmtp.models.blueprint`.
        native: the model's own layers for multi-token prediction, which heads of kind ``native`` are.
        head_dtype: of the parameters of new heads. Default: that of ``base``.

    Raises:
        ConfigError: the architecture cannot get heads; the message says why.
        WMTPError: ``head_state`` lacks a tensor, or has one too many or of the wrong shape.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        heads: HeadsConfig,
        *,
        head_state: Mapping[str, Tensor] | None = None,
        seed: int,
        precomputed: tuple[Anatomy, Packing] | None = None,
        native: Native | None = None,
        head_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.anatomy: Anatomy = dissect(base) if precomputed is None else precomputed[0]
        self.packing: Packing = find_packing(self.anatomy) if precomputed is None else precomputed[1]
        self.base = base
        self.block_attention = False
        self.compiled_layers = False
        layout = heads.layout or served_layout(type(base).__name__)
        self.heads = heads = evolve(heads, kind=heads.known_kind, layout=layout)
        self.kind = HEAD_KINDS[heads.known_kind]
        self.native = native if heads.kind == "native" else None  #: where its heads' tensors stand in its folder
        maker = Maker(base=base, anatomy=self.anatomy, init=heads.init, layout=layout, native=self.native, dtype=head_dtype)
        with seeded(seed):
            self.extra_heads = self.kind.build(maker, heads.horizon - 1)
        kinds = {type(layer) for layer in self.anatomy.layers}
        self.packing.prepare([*self.anatomy.layers, *(part for part in self.extra_heads.modules() if type(part) in kinds)])
        if head_state is not None:
            load_heads(self.extra_heads, head_state)
        self.source: Path | None = None  #: the file or folder that it was opened from
        self.untouched: Untouched | None = None  #: what else its folder holds; see `take_origin`
        self.draft_ids: tuple[int, ...] | None = None  #: the tokens that heads 2..H draft from; None: all
        self.stored: Mapping[str, str] = {}  #: parameters that are tensors of the folder's files; see `LoadedModel.stored`
        self.adapter: Adapter | None = None  #: what learns in place of the base; see `wmtp.models.adapters`
        self._tokenizer: Tokenizer | None = None
        self.training = base.training
        self.extra_heads.train(base.training)

    @property
    def horizon(self) -> int:
        """H."""
        return self.heads.horizon

    @property
    def called_layer(self) -> nn.Module:
        """Decoder layer whose mask and positions the heads' layers get.

        It is the one that they are like.
        """
        template = "last" if self.native is None else layout_named(self.native.layout).template
        return self.anatomy.layers[0 if template == "first" else -1]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.anatomy.hidden_size

    @property
    def vocab_size(self) -> int:
        """V, the rows of the unembedding."""
        return self.anatomy.output.out_features

    @property
    def max_positions(self) -> int | None:
        """Longest possible row; None where there is no limit."""
        return max_positions(self.base.config)

    def fixed_parameters(self) -> list[nn.Parameter]:
        """List the parameters that never learn.

        With an adapter these are all of the base's own.
        """
        if self.adapter is None:
            return []
        parts = [self.base, self.extra_heads] if self.adapter.in_heads else [self.base]
        return [parameter for part in parts for name, parameter in part.named_parameters() if not is_adapter_name(name)]

    def own_state(self) -> dict[str, Tensor]:
        """Return the state dict without an adapted base's own weights.

        Its tensors are the parameters themselves.
        """
        state = self.state_dict(keep_vars=True)
        return state if self.adapter is None else _without_fixed(state, "base.")

    def learned_state(self) -> dict[str, Tensor]:
        """Return the state dict without what never learns.

        Its tensors are the parameters themselves.
        """
        state = self.own_state()
        return _without_fixed(state, "extra_heads.") if self.adapter is not None and self.adapter.in_heads else state

    def merge_adapter(self) -> None:
        """Merge the adapter into the weights.

        What is left is a plain model that can be saved whole.
        """
        if self.adapter is not None:
            merge(self.base)
            merge(self.extra_heads)
            self.adapter = None

    def check_packing(self) -> None:
        """Refuse rows of several documents where the architecture cannot separate them.

        Raises:
            ConfigError: this architecture's attention or positions would cross from one document into the next.
        """
        if self.packing.problem is not None:
            raise ConfigError(f"data.train.packing: {self.packing.problem}; set data.train.packing = false")

    def use_block_attention(self) -> bool:
        """Switch to `wmtp.models.attention` where the architecture can.

        Returns whether it does.
        """
        self.block_attention = use_block_attention(self.anatomy)
        return self.block_attention

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, packed: bool = False, router_logits: bool = False
    ) -> MTPOutput:
        """Run trunk and heads.

        Args:
            input_ids: ``[B, S]``. Padding stands on the right, where causal attention never looks at it.
            position_ids: ``[B, S]``, places counted from 0 in each document. Read only if ``packed``.
            packed: some row holds several documents; none of them sees another. False costs no mask.
            router_logits: return those of the base's layers too, where it is a mixture of experts.

        Returns:
            The trunk's output and the hidden states of all H heads.

        Raises:
            ConfigError: ``packed``, and the architecture cannot keep documents apart.
            ValueError: ``packed``, and there are no positions.
        """
        if not packed:
            return self._run(input_ids, None, router_logits)
        self.check_packing()
        if position_ids is None:
            raise ValueError("position_ids: packed rows need them, counted from 0 in each document; give them")
        with reading(self.packing.documents(position_ids)):
            return self._run(input_ids, position_ids, router_logits)

    def _run(self, input_ids: Tensor, position_ids: Tensor | None, router_logits: bool) -> MTPOutput:
        """Run trunk and heads; ``position_ids`` only of packed rows."""
        arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if position_ids is not None:
            arguments |= self.packing.arguments(self.anatomy, position_ids)
        if router_logits:
            arguments["output_router_logits"] = True
        if self.block_attention:
            mask = causal_mask(input_ids.device) if position_ids is None else document_mask(position_ids)
            arguments["attention_mask"] = mask
        last = self.anatomy.layers[-1]
        with record_call(last) as calls, record_call(self.called_layer) as own_calls, record_output(last) as outputs:
            output = self.anatomy.decoder(**arguments)
        first, routed = output.last_hidden_state, tuple(output.router_logits or ()) if router_logits else ()
        trunk, raw = calls[0].hidden_states, outputs[0]
        if self.horizon == 1:
            return MTPOutput(trunk=trunk, hidden=(first,), router_logits=routed)

        joint = self.heads.trunk_gradient == "joint"
        given = HeadInput(
            call=own_calls[0],
            trunk=trunk if joint else trunk.detach(),
            hidden=first if joint else first.detach(),
            raw=raw if joint else raw.detach(),
            input_ids=input_ids,
            positions=torch.arange(input_ids.shape[1], device=input_ids.device)[None] if position_ids is None else position_ids,
            embed=_shared(self.anatomy.embedding, joint),
            final_norm=self._tail(joint),
        )
        further = self.kind.run(self.extra_heads, given, self.horizon - 1)
        return MTPOutput(trunk=trunk, hidden=(first, *further), router_logits=routed)

    def unembedding(self, head: int) -> Unembedding:
        """Return the unembedding of one head: from its hidden states to logits.

        Args:
            head: 1..H.
        """
        if not 1 <= head <= self.horizon:
            raise ValueError(f"head must be in 1..{self.horizon}, not {head}")
        own = self.kind.unembeddings(self.extra_heads, self.horizon - 1)[head - 2] if head > 1 else None
        if own is not None:
            return self.anatomy.unembedding(own.weight, own.bias)
        weight, bias = self.anatomy.output.weight, self.anatomy.output.bias
        if head > 1 and self.heads.trunk_gradient == "detach":
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return self.anatomy.unembedding(weight, bias)

    def logits(self, output: MTPOutput, head: int) -> Tensor:
        """Compute logits ``[B, S, V]`` of one head (1..H), for inference.

        A loss should go by chunks.
        """
        return self.unembedding(head).logits(output.hidden[head - 1])

    def save_pretrained(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder for plain transformers, with the extra heads.

        With an adapter it is an adapter folder, which PEFT opens on the base, with the heads.

        Args:
            folder: made if it is not there.
            state: the state dict with whole tensors, where this process holds only a part of them.

        Raises:
            WMTPError: it could not be written in full: the disk is full, say.
        """
        if self.adapter is None:
            self.save_base(folder, state)
        try:
            if self.adapter is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write_adapter(self.base, self.adapter, folder, None if state is None else _within(state, "base."))
            remove_heads(folder)
            if self.native is not None and self.adapter is None:
                describe_heads(folder, self.heads, self.draft_ids)  # the folder has the tensors under its own names
            elif self.horizon > 1:
                own = self.extra_heads.state_dict() if state is None else _within(state, "extra_heads.")
                write_heads(folder, self.heads, self.draft_ids, own)
        except (OSError, SafetensorError) as error:
            raise WMTPError(f"{folder}: the model could not be written: {error}") from error

    def save_base(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write head 1, the model itself.

        All that its folder held besides it comes along.

        Args:
            folder: made if it is not there.
            state: as for `save_pretrained`.

        Raises:
            WMTPError: it could not be written in full, or transformers refuses to write its configs.
            ValueError: an adapter is on it.
        """
        if self.adapter is not None:
            raise ValueError("the model has an adapter, so its weights alone are not what it computes; merge_adapter() first")
        own = None if state is None else _within(state, "base.")
        added: Mapping[str, Tensor] = {}
        if self.native is not None and (state is None or own):  # of several processes, one has the tensors
            heads = self.extra_heads.state_dict() if state is None else _within(state, "extra_heads.")
            added = folder_tensors(self.native, heads, self.base, own)
        write_base(self.base, folder, state=own, source=self.source, untouched=self.untouched, added=added)

    def take_origin(self, other: MTPModel) -> None:
        """Take over how ``other`` would be saved.

        That is under the names of its files, and with what else they hold.
        """
        self.source, self.untouched, self.draft_ids = other.source, other.untouched, other.draft_ids
        if (conversions := getattr(other.base, "_weight_conversions", None)) is not None:
            self.base._weight_conversions = conversions

    def _tail(self, joint: bool) -> Callable[[Tensor], Tensor]:
        steps = [_shared(module, joint) for module in self.anatomy.tail]

        def apply(hidden: Tensor) -> Tensor:
            for step in steps:
                hidden = first_tensor(step(hidden))
            return hidden

        return apply


def _without_fixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Leave out the tensors of one part that are no adapter's."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefix) or is_adapter_name(name)}


def _within(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _shared(module: nn.Module, joint: bool) -> Callable[[Tensor], Tensor]:
    """``module`` as it is, or with parameters that get no gradient."""
    if joint:
        return module
    return lambda x: functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, (x,))
