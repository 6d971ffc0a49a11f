"""Views that a trainer is given in each step. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

from wmtp.errors import PluginError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wmtp.data.batch import Batch, Targets

__all__ = ["HiddenView", "NotComputed", "StepView", "check_unchanged", "versions"]


@frozen(kw_only=True, eq=False)
class HiddenView:
    """One micro-batch, as the model sees it.

    Args:
        batch: b rows.
        targets: ``[b, S, H]``.
        packed: whether some row of the step holds several documents; what another model's ``forward`` needs to know.
        stage: the name of the stage that the step belongs to.
        trunk: ``[b, S, D]``, the hidden states that feed the heads. They carry a gradient where the trunk learns: detach
            them to keep a module's loss out of the trunk.
    """

    batch: Batch
    targets: Targets
    packed: bool
    stage: str
    trunk: Tensor


class NotComputed(PluginError):
    """A trainer reads something that is computed only where its class says so.

    Args:
        name: of the view's attribute.
        flag: of the class.
    """

    def __init__(self, name: str, flag: str) -> None:
        self.name = name
        self.flag = flag
        super().__init__(f"view.{name} was not computed; write {flag} = True in the trainer's class")


@frozen(kw_only=True, eq=False)
class StepView:
    """A whole optimizer step: all rows of all micro-batches and devices, in the order of the data.

    Args:
        batch: B rows.
        targets: ids and valid mask, ``[B, S, H]``.
        token_loss: CE[t, k], ``[B, S, H]`` fp32, detached, 0 where not valid. Only where the trainer's ``needs_token_loss``
            is True; reading it elsewhere is an error.
        entropy: of what head k predicts at t, in nats: ``[B, S, H]`` fp32, detached, 0 where not valid. Only where the
            trainer's ``needs_entropy`` is True.
        observations: what `Trainer.observe` returned, ``[B, S]`` or ``[B, S, H]``, 0 at padding. In
            `Trainer.auxiliary_losses` they carry a gradient; in `Trainer.token_weights` they are detached.
        step: the optimizer step, from 0.
        stage: the name of the stage that the step belongs to.
        generator: random numbers that depend on the seed and the step only.
        vocab_size: V.
    """

    batch: Batch
    targets: Targets
    _token_loss: Tensor | None = field(alias="token_loss")
    _entropy: Tensor | None = field(alias="entropy")
    observations: Mapping[str, Tensor]
    step: int
    stage: str
    generator: torch.Generator
    vocab_size: int
    _uniform: list[tuple[Tensor, int]] = field(init=False, factory=list)  # what `uniform` has made, and its version then

    @property
    def token_loss(self) -> Tensor:
        """Cross entropy of each prediction, ``[B, S, H]``."""
        if self._token_loss is None:
            raise NotComputed("token_loss", "needs_token_loss")
        return self._token_loss

    @property
    def entropy(self) -> Tensor:
        """Entropy of each prediction's distribution, ``[B, S, H]``."""
        if self._entropy is None:
            raise NotComputed("entropy", "needs_entropy")
        return self._entropy

    def uniform(self) -> Tensor:
        """Make uniform weights: ``[B, S, H]`` fp32 ones, which the caller may change."""
        import torch

        ones = torch.ones(self.targets.ids.shape, device=self.targets.ids.device)
        self._uniform.append((ones, ones._version))
        return ones

    def is_uniform(self, weights: Tensor) -> bool:
        """Tell whether ``weights`` are those of `uniform`, unchanged; without waiting for the device."""
        return any(weights is ones and ones._version == version for ones, version in self._uniform)

    def by_prediction(self, by_token: Tensor) -> Tensor:
        """Place token values ``[B, S]`` at the predictions of those tokens ``[B, S, H]``: out[t, k] = by_token[t+k]."""
        from wmtp.data.batch import shift_to_predictions

        return shift_to_predictions(by_token, self.targets.ids.shape[-1])


def versions(view: StepView) -> dict[str, int]:
    """Count how often each tensor of a view was changed in place, as torch does anyway."""
    return {name: tensor._version for name, tensor in _tensors(view)}


def check_unchanged(view: StepView, before: Mapping[str, int], name: str) -> None:
    """Refuse what a trainer has done to the loop's own numbers: losses that are logged, targets, tokens.

    Args:
        view: what the trainer was given.
        before: its `versions` then.
        name: what messages call the trainer.

    Raises:
        PluginError: a tensor has changed.
    """
    for key, version in versions(view).items():
        if version != before[key]:
            raise PluginError(f"{name}: it changed view.{key} in place, which the loop goes on to use; change a clone() of it")


def _tensors(view: StepView) -> Iterator[tuple[str, Tensor]]:
    batch, targets = view.batch, view.targets
    named = {
        "batch.input_ids": batch.input_ids,
        "batch.document": batch.document,
        "batch.position": batch.position,
        "batch.learn": batch.learn,
        "batch.weight": batch.weight,
        "targets.ids": targets.ids,
        "targets.valid": targets.valid,
        "token_loss": view._token_loss,
        "entropy": view._entropy,
    }
    yield from ((key, tensor) for key, tensor in named.items() if tensor is not None)
    yield from ((f"observations[{key!r}]", tensor) for key, tensor in view.observations.items())
