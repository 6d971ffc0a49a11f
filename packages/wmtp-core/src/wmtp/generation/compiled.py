"""Compiled layers for decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wmtp.errors import ConfigError
from wmtp.models.acceleration import compile_layers

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = ["compile_model"]


def compile_model(model: MTPModel) -> None:
    """Compile a model's layers, so that decoding launches fewer kernels.

    Takes seconds at the first steps of each batch size; worth it for many tokens. The tokens stay those that head 1 chooses:
    ties are decided as without it.

    Args:
        model: in place, on a CUDA device.

    Raises:
        ConfigError: it is elsewhere, where steps have no fixed shapes.
    """
    device = model.anatomy.output.weight.device
    if device.type != "cuda":
        raise ConfigError(
            f"--compile: decoding is compiled on a CUDA device only, and the model is on {device.type}; remove it"
        )
    if not model.block_attention:
        model.use_block_attention()  # reads keys and values that several heads share without copying them
    compile_layers(model)
