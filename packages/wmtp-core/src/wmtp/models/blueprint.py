"""Description of a model, from which another process builds it empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from wmtp.config.schema import HeadsConfig
from wmtp.errors import WMTPError
from wmtp.models.adapters import Adapter, put_on, quantize_base
from wmtp.models.anatomy import Anatomy
from wmtp.models.mtp import MTPModel
from wmtp.models.native.found import Native
from wmtp.models.packing import Packing

__all__ = ["Blueprint"]

_PARTS = ("decoder", "embedding", "output", "layers")
_LOGITS = ("scale", "softcap", "divides", "float32")


@frozen(kw_only=True, eq=False)
class Blueprint:
    """Findings of `MTPModel` about a model that an empty copy cannot repeat.

    Args:
        model_class: of the base.
        config: of the base.
        generation_config: of the base, kept apart from its config; None where it has none.
        parts: the path in the base of each part of its anatomy.
        tail: the paths of the modules after the last layer.
        logits: how logits are scaled and capped.
        packing: how rows hold several documents.
        block_attention: whether it attends by `wmtp.models.attention`; the config says so too.
        heads: its heads.
        native: its own layers for multi-token prediction, where the heads are these.
        adapter: its adapter; None where it has none.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    parts: Mapping[str, str]
    tail: tuple[str, ...]
    logits: Mapping[str, Any]
    packing: Packing
    block_attention: bool
    heads: HeadsConfig
    native: Native | None = None
    adapter: Adapter | None = None

    @classmethod
    def of(cls, model: MTPModel) -> Blueprint:
        """Describe a model."""
        anatomy = model.anatomy
        paths = {id(module): path for path, module in model.base.named_modules()}
        return cls(
            model_class=type(model.base),
            config=model.base.config,
            generation_config=model.base.generation_config,
            parts={part: paths[id(getattr(anatomy, part))] for part in _PARTS},
            tail=tuple(paths[id(module)] for module in anatomy.tail),
            logits={name: getattr(anatomy, name) for name in _LOGITS},
            packing=model.packing,
            block_attention=model.block_attention,
            heads=model.heads,
            native=model.native,
            adapter=model.adapter,
        )

    def build(self) -> MTPModel:
        """Build the model on the meta device, without memory for its weights.

        Raises:
            WMTPError: building it computes numbers and stores them where another process cannot fill them in.
        """
        with torch.device("meta"):
            base = self.model_class(self.config).eval()
        base.generation_config = self.generation_config  # type: ignore[assignment]
        parts: dict[str, Any] = {part: base.get_submodule(path) for part, path in self.parts.items()}
        anatomy = Anatomy(**parts, tail=tuple(map(base.get_submodule, self.tail)), **self.logits)
        hidden = [
            f"{path}.{name}"
            for path, module in base.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, torch.Tensor) and value.is_meta
        ]
        if hidden:
            raise WMTPError(
                f"{self.model_class.__name__} cannot be sharded over processes: it keeps tensors outside its parameters and "
                f"buffers ({', '.join(hidden)}); set launcher.processes = 1"
            )
        model = MTPModel(base, self.heads, seed=0, precomputed=(anatomy, self.packing), native=self.native)
        model.block_attention = self.block_attention
        if (adapter := self.adapter) is not None:
            own = {"base": adapter.base, "known": adapter.fingerprint, "quantize": adapter.quantize}
            own["in_heads"] = adapter.in_heads
            put_on(model, adapter.config, seed=0, **own)
            quantize_base(model)
        return model
