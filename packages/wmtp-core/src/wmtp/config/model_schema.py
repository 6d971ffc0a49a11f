"""Sections ``[models.*]`` of a config: loader, heads, adapters."""

from __future__ import annotations

import math
from typing import Literal

from attrs import Attribute, field, frozen
from attrs.validators import and_, deep_iterable, ge, gt, le, lt, min_len, optional

from wmtp.plugins.components import component
from wmtp.plugins.contract import ModelLoaderConfig

__all__ = ["HeadsConfig", "LoraConfig", "ModelConfig"]


@frozen(kw_only=True)
class HeadsConfig:
    """Heads that predict the next ``horizon`` tokens.

    Head 1 is the model's own.

    Args:
        horizon: H, how many tokens ahead are predicted.
        kind: architecture of heads 2..H. ``block``: a decoder layer each on the trunk (Meta, arXiv 2404.19737); ``linear``: an
            unembedding each; ``residual``: a residual SiLU layer each before the shared unembedding (Medusa, arXiv
            2401.10774); ``chained``: a decoder layer each, fed by the previous depth and the embedding of the token that
            it predicted (DeepSeek-V3, arXiv 2412.19437); ``shared``: one such layer applied again and again (FastMTP,
            arXiv 2509.18362); ``native``: the model's own layers for multi-token prediction, in turn where ``horizon`` asks
            for more. A model that brings heads of WMTP's keeps them, and must agree with this. Default: what the model
            brings, else ``native`` where it has such layers, else ``block``.
        layout: how ``chained`` and ``shared`` heads are fed. ``mimo``: as servers feed MiMo-7B's layer, so that they can be
            exported to one: the hidden states before the model's final norm, a norm of their own at the end, no embedding at
            position 0. ``exaone``: as servers feed K-EXAONE's: the hidden states after the final norm, a norm of their own at
            the end, every embedding. ``plain``: the hidden states after the final norm, that same norm at the end, every
            embedding. Default: what the model brings, else ``exaone`` for a Qwen3 and ``mimo`` for all others.
        init: initial weights of new heads. ``copy``: from the model's last layer (``linear``: from its unembedding;
            ``residual``: as the identity); ``random``: from the model's own initializer.
        trunk_gradient: ``joint``: all heads train the trunk; ``detach``: only head 1 does.
        head_weights: α, one a head. Default 1 each.
        decay: instead of ``head_weights``: α_k = decay^(k−1).
        objective: what heads 2..H learn: ``ce``, the data, as head 1 does; ``kl``, ``tv`` or ``lk``, to agree with head 1's
            distribution of the same token, by which their drafts are accepted: docs/loss.md has the formulas. Weights, α and
            normalizer hold in the same way.
        lk_eta: η of ``lk``; 3 in vLLM's ``speculators`` too.
        draft_vocabulary: number of tokens that heads 2..H draft from in decoding: the most frequent of the training data, and
            those that end a text (FastMTP, arXiv 2509.18362). A smaller product for each draft, and the same text. Training and
            its metrics are of the whole vocabulary. Default: all, or what the model brings.
        warmup_steps: number of optimizer steps at the start in which only heads 2..H are trained, on a frozen model. As many as
            the run has leave the model as it is.
        lr_factor: multiplies ``optimizer.lr`` for heads 2..H; new heads tolerate a higher rate than a pretrained model.
    """

    horizon: int = field(default=4, validator=ge(1))
    kind: Literal["block", "linear", "residual", "chained", "shared", "native"] | None = None
    layout: Literal["mimo", "exaone", "plain"] | None = None
    init: Literal["copy", "random"] = "copy"
    trunk_gradient: Literal["joint", "detach"] = "joint"
    head_weights: tuple[float, ...] | None = field(default=None, validator=optional(deep_iterable(and_(ge(0.0), lt(math.inf)))))
    decay: float | None = field(default=None, validator=optional([gt(0.0), le(1.0)]))
    objective: Literal["ce", "kl", "tv", "lk"] = "ce"
    lk_eta: float = field(default=3.0, validator=[ge(0.0), lt(math.inf)])
    draft_vocabulary: int | None = field(default=None, validator=optional(ge(1)))
    warmup_steps: int = field(default=0, validator=ge(0))
    lr_factor: float = field(default=1.0, validator=[gt(0.0), lt(math.inf)])

    @property
    def known_kind(self) -> str:
        """Kind of the heads of a model that brings none."""
        return self.kind or "block"

    def resolved_head_weights(self) -> tuple[float, ...]:
        """α of heads 1..H."""
        if self.head_weights is not None:
            return self.head_weights
        return tuple((self.decay or 1.0) ** k for k in range(self.horizon))


def _no_dropout(_: object, __: Attribute[float], value: float) -> None:
    if value:
        raise ValueError(
            f"{value}, but adapters learn without dropout: weights and loss of a step come from the same "
            "forward pass, and a resumed or divided run repeats it; remove this key"
        )


@frozen(kw_only=True)
class LoraConfig:
    """Low-rank adapters in the model's layers (LoRA, arXiv 2106.09685).

    They are trained instead of the model, which is frozen. What is saved is an adapter folder, which PEFT opens too, with heads
    2..H.

    Args:
        rank: r, of the two matrices of an adapter.
        alpha: an adapter's output is multiplied by alpha / rank. Default: twice the rank.
        targets: ``all-linear``: every linear map of the decoder layers; or their names, as ``["q_proj", "v_proj"]``.
        dropout: of an adapter's input: 0, nothing else. Known so that a copied recipe is told.
        dora: learn the length of each weight vector apart from its direction (DoRA, arXiv 2402.09353).
        rslora: multiply by alpha / √rank (rsLoRA, arXiv 2312.03732).
        heads: ``full``: heads 2..H learn all of their weights. ``adapters``: they learn by adapters of their own, of the same
            settings, in their decoder layers; for heads that begin as copies of the last layer (``block``) or are the model's
            own (``native``), and take little memory.
    """

    rank: int = field(default=16, validator=ge(1))
    alpha: float | None = field(default=None, validator=optional([gt(0.0), le(1e9)]))
    targets: Literal["all-linear"] | tuple[str, ...] = field(default="all-linear", validator=min_len(1))
    dropout: float = field(default=0.0, validator=_no_dropout)
    dora: bool = False
    rslora: bool = False
    heads: Literal["full", "adapters"] = "full"

    @property
    def resolved_alpha(self) -> float:
        """Alpha, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@frozen(kw_only=True)
class ModelConfig:
    """One model: its loader, and for ``[models.base]`` heads and adapters.

    In TOML ``type`` and the loader's keys are in this table too.

    Args:
        loader: where the model comes from. In TOML its keys are in the model's own table.
        heads: the multi-token-prediction heads; only ``base`` has them.
        lora: low-rank adapters; only ``base`` has them. Default: the whole model learns.
        quantize: ``nf4`` keeps the weights of the decoder layers in 4 bits (QLoRA, arXiv 2305.14314); with adapters only.
    """

    loader: ModelLoaderConfig = component("model_loaders")
    heads: HeadsConfig | None = None
    lora: LoraConfig | None = None
    quantize: Literal["nf4"] | None = None
