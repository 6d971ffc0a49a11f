"""Estimate of a run's speed on named GPUs. Torch-free.

A step takes the time of its matrix products at the rate that the cards reach with them, of the bytes that everything between
the products and the optimizer moves, and of what several devices exchange and cannot hide. The constants were fitted to
measured runs, which a test repeats; see docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from attrs import frozen

from wmtp.training.memory import adapter_parameters, head_parameters, kept_by_layer

if TYPE_CHECKING:
    from wmtp.config.schema import Config, HeadsConfig
    from wmtp.models.base import ModelInfo

__all__ = ["CARDS", "Card", "describe_speed", "readable_time", "step_seconds"]

#: share of a data sheet's matrix rate that products reach at the card's power limit
_RATE: Final = 0.69
#: times that products of layers are faster in fp8
_FP8: Final = 1.55
#: the same for logits, and for the gradient of the hidden states
_FP8_LOGITS, _FP8_HIDDEN = 1.8, 1.37
#: share of its memory's rate
_BANDWIDTH: Final = 0.83
#: bytes that a layer moves between its products, forward and backward, by the bytes that it keeps for the backward pass
_COMPILED, _EAGER = 8.0, 27.0
#: times that a logit is written or read
_LOGITS: Final = 4.0
#: bytes that an optimizer step moves a parameter that learns
_OPTIMIZER: Final = 30.0
#: share of a link's rate, and of an exchange that no computation hides
_LINK, _EXPOSED = 0.45, 0.5
#: seconds in which the host launches a step: in all, and a layer; not measured, for models too small to keep a GPU busy
_LAUNCH: Final = 5e-3
_COMPILED_LAUNCHES, _EAGER_LAUNCHES = 0.25e-3, 0.75e-3


@frozen(kw_only=True)
class Card:
    """Rates of a GPU, by its data sheet.

    Args:
        matrix: dense bf16 operations a second.
        fp32: operations a second in fp32.
        memory: bytes a second.
        link: bytes a second to the other devices of its machine, one way.
    """

    matrix: float
    fp32: float
    memory: float
    link: float


#: by name; the first two were measured
CARDS: Final[Mapping[str, Card]] = {
    "H100": Card(matrix=989e12, fp32=67e12, memory=3.35e12, link=450e9),
    "H200": Card(matrix=989e12, fp32=67e12, memory=4.8e12, link=450e9),
    "A100": Card(matrix=312e12, fp32=19.5e12, memory=2.0e12, link=300e9),
}


def step_seconds(
    config: Config,
    info: ModelInfo,
    heads: HeadsConfig,
    card: Card,
    *,
    world_size: int = 1,
    others: Mapping[str, ModelInfo] | None = None,
) -> float:
    """Estimate the seconds of an optimizer step whose rows are full.

    Args:
        config: for rows, precision, checkpointing and compilation.
        info: of the base model.
        heads: the heads that it gets.
        card: of each device.
        world_size: processes of the job.
        others: further models that read each row, by name.
    """
    devices, data, lora = config.devices, config.data.train, config.models["base"].lora
    width, vocabulary = info.hidden_size, info.vocab_size
    half = devices.precision != "fp32"
    compute, residual = (2 if half else 4), (2 if devices.keeps_bf16 else 4)
    extra = heads.horizon - 1 if heads.known_kind not in ("linear", "residual") else 0
    layers, attention = info.layers + extra, data.max_length * width
    tokens = -(-data.batch_size // world_size) * data.max_length

    products = 6 if lora is None else 4  # what never learns has no gradient of its own
    of_layers = layers * (info.layer_parameters + attention)
    operations = products * of_layers + 6 * heads.horizon * vocabulary * width
    passes = _COMPILED if devices.compile else _EAGER
    moved = layers * kept_by_layer(devices, info, compute, residual) * passes
    again = 2 if devices.activation_checkpointing in ("full", "offload") else 0  # the layers' forward pass once more
    if again:
        operations += again * of_layers
        moved *= 4 / 3
    moved += _LOGITS * compute * heads.horizon * vocabulary
    for other in (others or {}).values():
        operations += 2 * (other.layers * (other.layer_parameters + data.max_length * other.hidden_size))
        operations += 2 * other.vocab_size * other.hidden_size
        moved += other.layers * kept_by_layer(devices, other, compute, residual) * passes / 3
        moved += _LOGITS * compute * other.vocab_size

    learned = head_parameters(info, heads) + (info.parameters if lora is None else adapter_parameters(info, lora))
    shared = world_size > 1 and (devices.fsdp is None or devices.fsdp.strategy != "none")
    bytes_moved = tokens * moved + _OPTIMIZER * learned / (world_size if shared else 1)
    if devices.precision == "fp8":
        operations -= (products + again) * layers * info.layer_parameters * (1 - 1 / _FP8)
        logits = "none" if devices.fp8 is None else devices.fp8.logits
        if logits != "none":
            operations -= 2 * heads.horizon * vocabulary * width * (1 - 1 / _FP8_LOGITS)
        if logits == "hidden-gradient":
            operations -= 2 * heads.horizon * vocabulary * width * (1 - 1 / _FP8_HIDDEN)
    seconds = tokens * operations / (_RATE * (card.matrix if half else card.fp32)) + bytes_moved / (_BANDWIDTH * card.memory)
    if world_size > 1:
        gathered = 2 * compute * (info.parameters + head_parameters(info, heads)) if shared else 0
        exchanged = (gathered + 4 * learned) * (world_size - 1) / world_size
        seconds += _EXPOSED * exchanged / (_LINK * card.link)
    return max(seconds, _LAUNCH + layers * (_COMPILED_LAUNCHES if devices.compile else _EAGER_LAUNCHES))


def describe_speed(
    config: Config,
    info: ModelInfo,
    heads: HeadsConfig,
    *,
    steps: int | None,
    world_size: int = 1,
    others: Mapping[str, ModelInfo] | None = None,
) -> str:
    """Describe tokens a second on each of `CARDS`, and the hours.

    The hours are those of ``steps`` optimizer steps.
    """
    tokens = config.data.train.batch_size * config.data.train.max_length
    parts = []
    for name, card in CARDS.items():
        seconds = step_seconds(config, info, heads, card, world_size=world_size, others=others)
        devices = f"{world_size} × {name}" if world_size > 1 else name
        hours = "" if steps is None else f", {readable_time(steps * seconds)}"
        parts.append(f"{devices} about {_rounded(tokens / seconds)} tokens/s{hours}")
    return f"{'; '.join(parts)} (full rows, the training steps alone)"


def readable_time(seconds: float) -> str:
    """Minutes or hours, with two digits that count."""
    if seconds < 60:
        return "under a minute"
    return f"{_rounded(seconds / 60)} min" if seconds < 3600 else f"{_rounded(seconds / 3600)} h"


def _rounded(number: float) -> str:
    """Two digits that count."""
    shown = float(f"{number:.1e}")
    return f"{shown:,.0f}" if shown >= 10 else f"{shown:g}"
