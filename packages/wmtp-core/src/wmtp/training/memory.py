"""How much memory a run will need, before it is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from wmtp.config.schema import Config, HeadsConfig
    from wmtp.models.base import ModelInfo

__all__ = ["MemoryEstimate", "estimate_memory", "head_parameters"]

# Numbers that one decoder layer keeps for its backward pass, per token and unit of width: two norms (in fp32 under autocast
# too), and queries, keys, values, their rotated copies, attention's output and the inputs of the products. A gated
# feed-forward layer keeps four times its own width besides.
_KEPT_BY_NORMS = 6
_KEPT_BY_ATTENTION = 8


@frozen(kw_only=True)
class MemoryEstimate:
    """Bytes on the device that trains. An estimate: activations depend on the architecture's details.

    Args:
        parameters: of model and heads; for bf16, with the copies that products use.
        gradients: of the same.
        optimizer: two running means a parameter (AdamW).
        activations: what the layers of one micro-batch keep for the backward pass.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
        }
        return f"about {_size(self.total)}: " + ", ".join(f"{name} {_size(value)}" for name, value in parts.items())


def head_parameters(info: ModelInfo, heads: HeadsConfig) -> int:
    """Parameters of heads 2..H; norms are left out."""
    extra, width = heads.horizon - 1, info.hidden_size
    return {
        "block": extra * info.layer_parameters,
        "linear": extra * info.vocab_size * width,
        "residual": extra * width * width,
        "chained": extra * (info.layer_parameters + 2 * width * width),
        "shared": min(extra, 1) * (info.layer_parameters + 2 * width * width),
    }[heads.kind]


def estimate_memory(config: Config, info: ModelInfo, heads: HeadsConfig) -> MemoryEstimate:
    """What training needs on its device.

    Args:
        config: for the size of a micro-batch and the precision.
        info: of the base model.
        heads: the heads that it gets.
    """
    parameters = info.parameters + head_parameters(info, heads)
    data = config.data.train
    tokens = min(data.micro_batch_size or data.batch_size, data.batch_size) * data.max_length
    layers = info.layers + heads.horizon - 1
    width = info.hidden_size
    half = config.devices.precision == "bf16"
    # a layer's parameters are about 2.5 D² for attention and 3 D F for a gated feed-forward layer of width F
    feed_forward = max(0.0, (info.layer_parameters / width - 2.5 * width) / 3)
    kept = 4 * _KEPT_BY_NORMS * width + (2 if half else 4) * (_KEPT_BY_ATTENTION * width + 4 * feed_forward)
    return MemoryEstimate(
        parameters=(6 if half else 4) * parameters,
        gradients=4 * parameters,
        optimizer=8 * parameters,
        activations=round(tokens * layers * kept),
    )


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
