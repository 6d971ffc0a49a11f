"""Another model that an algorithm compares with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from wmtp.data.batch import align_targets
from wmtp.errors import ConfigError
from wmtp.loss import token_losses
from wmtp.loss.anchor import divergence_from

if TYPE_CHECKING:
    from wmtp.data.batch import Batch
    from wmtp.models.mtp import MTPModel
    from wmtp.trainers import HiddenView, StepView, TrainerSetup

__all__ = ["by_head", "divergence", "mean_divergence", "next_token_losses", "open_reference"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Compares(Protocol):
    """Config of an algorithm with another model."""

    @property
    def type(self) -> str: ...
    @property
    def reference_precision(self) -> str: ...
    @property
    def reference_device(self) -> str | None: ...


def open_reference(config: _Compares, setup: TrainerSetup, name: str) -> MTPModel:
    """Load ``[models.<name>]`` where and as the config says.

    Raises:
        ConfigError: this machine has no such device.
    """
    device = setup.device
    if config.reference_device is not None:
        device = torch.device(config.reference_device)
        counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (device.index or 0) >= counts[device.type]:
            raise ConfigError(f"{config.type}: reference_device: this machine has no {device} that torch can use")
    return setup.model(name, dtype=_DTYPES[config.reference_precision], device=device)


@torch.no_grad()
def next_token_losses(model: MTPModel, batch: Batch, packed: bool) -> torch.Tensor:
    """A model's own next-token loss of each token, by one forward pass.

    Args:
        model: anywhere; it computes in the precision of its parameters.
        batch: b rows.
        packed: whether some row holds several documents; none of them sees another.

    Returns:
        ``[b, S]`` fp32 on the batch's device: −log P(x_j | x_<j) at place j, for every token to learn but the first of its
        document, which follows nothing; 0 elsewhere.
    """
    targets = align_targets(batch, horizon=1)
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        output = model(batch.input_ids.to(device), batch.position.to(device), packed)
        losses = token_losses(output.hidden, [model.unembedding(1)], targets.ids.to(device), targets.valid.to(device))
    by_token = torch.zeros(batch.input_ids.shape, device=batch.input_ids.device)
    by_token[:, 1:] = losses[:, :-1, 0]  # what is predicted at j − 1 is token j
    return by_token


def divergence(model: MTPModel, view: HiddenView) -> torch.Tensor:
    """Compute head 1's KL(p ‖ p_θ) from another model's p, with gradient.

    Args:
        model: anywhere; it computes in the precision of its parameters.
        view: of a micro-batch.

    Returns:
        ``[b, S]`` fp32; 0 where not valid.
    """
    batch, device = view.batch, next(model.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        output = model(batch.input_ids.to(device), batch.position.to(device), view.packed)
    other = output.hidden[0], model.unembedding(1)
    return divergence_from(other, view.hidden[0], view.unembeddings[0], view.targets.valid[..., 0])


def mean_divergence(view: StepView, divergence: torch.Tensor) -> torch.Tensor:
    """Average what `divergence` gave over head 1's valid predictions."""
    valid = view.targets.valid[..., 0]
    return (divergence * valid).sum() / valid.sum().clamp(min=1)


def by_head(view: StepView, divergence: torch.Tensor) -> torch.Tensor:
    """Place what `divergence` gave at head 1's predictions, for the report.

    It stands where a prediction is made, and the report shows a number of ``[B, S]`` at the token of its place: the one before.

    Returns:
        ``[B, S, H]``, NaN at the other heads.
    """
    shown = torch.full(view.targets.valid.shape, torch.nan, device=view.targets.valid.device)
    shown[..., 0] = divergence.detach().float()
    return shown
