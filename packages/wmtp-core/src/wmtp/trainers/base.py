"""Contract of an algorithm: which predicted tokens matter, and how much.

Importing this module imports no torch. The loop does everything else, the same for every algorithm. One optimizer step is:

1. every micro-batch goes through the model; `Trainer.observe` turns hidden states into numbers per token;
2. the numbers of the *whole* step, all micro-batches and all devices, are put together in one `StepView`;
3. `Trainer.token_weights` and `Trainer.auxiliary_losses` are called once on that view;
4. the gradient of  L = Σ α_k · w[t,k] · CE[t,k] / Z + Σ auxiliary losses  is computed, micro-batch by micro-batch.

So quantiles, whitening, means or pairs of sequences are plain mathematics over the whole batch, and no result depends on how
a batch is split. Step 1 costs a forward of its own only where an algorithm needs something of it and there is more than one
micro-batch.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field, frozen

from wmtp.errors import PluginError
from wmtp.plugins.contract import Contract, TrainerConfig
from wmtp.trainers.inspection import flag_problems, method_problems

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from wmtp.config.schema import EarlyStoppingConfig
    from wmtp.data.batch import Batch, Targets
    from wmtp.data.dataset import TokenDataset
    from wmtp.loss import Unembedding
    from wmtp.trainers.setup import TrainerSetup

__all__ = ["HiddenView", "NotComputed", "PredictionChunk", "Stage", "StepView", "Trainer"]


@frozen(kw_only=True)
class Stage:
    """Stage of a run.

    Args:
        name: logged, and shown.
        steps: optimizer steps; None: the rest of the run.
        frozen: parts without training: ``model`` (trunk, head 1, embeddings), ``heads`` (heads 2..H), or names of
            `Trainer.modules`.
        model_loss: whether the weighted multi-token loss is part of the loss; False: only the auxiliary losses are.
        until: ends the stage before its ``steps`` when a metric of its steps no longer improves; ``patience`` counts
            optimizer steps. The next stage starts then: stages of fixed length keep their length, and the last lasts to the
            end of the run. A metric of single batches is noisy: better watch a running mean of `Trainer.metrics`. Not for the
            last stage.
    """

    name: str = "train"
    steps: int | None = None
    frozen: frozenset[str] = frozenset()
    model_loss: bool = True
    until: EarlyStoppingConfig | None = None


@frozen(kw_only=True, eq=False)
class PredictionChunk:
    """Predictions of one head, at n places of a micro-batch.

    Args:
        head: 1..H.
        places: of the n places among all b · S, so that ``other.flatten(0, 1)[places]`` is ``[n, …]`` of any ``[b, S, …]``.
        logits: ``[n, V]`` fp32 (fp64 in a model of fp64), without gradient.
        ids: ``[n]`` int64, the targets; 0 where there is none.
    """

    head: int
    places: slice
    logits: Tensor
    ids: Tensor


@frozen(kw_only=True, eq=False)
class HiddenView:
    """One micro-batch, as the model sees it.

    Args:
        batch: b rows.
        targets: ``[b, S, H]``.
        packed: whether some row of the step holds several documents; another model's ``forward`` needs it.
        stage: the name of the stage that the step belongs to.
        trunk: ``[b, S, D]``, the hidden states that feed the heads. They carry a gradient where the trunk learns: detach
            them to keep a module's loss out of the trunk.
        hidden: H tensors ``[b, S, D]``, the inputs of each head's unembedding; with a gradient as ``trunk``.
        unembeddings: one a head: ``weight`` ``[V, D]``, ``bias`` ``[V]`` or None, and ``logits(hidden)``.
    """

    batch: Batch
    targets: Targets
    packed: bool
    stage: str
    trunk: Tensor
    hidden: Sequence[Tensor]
    unembeddings: Sequence[Unembedding]

    def each_prediction(self, number: Callable[[PredictionChunk], Tensor], *, chunk: int = 1024) -> Tensor:
        """Compute a number for each prediction from its logits, in chunks.

        Never more than ``chunk · V`` logits are held. Without gradient, so it serves weights and what is logged, not auxiliary
        losses.

        Args:
            number: makes ``[n]`` of a chunk of n places.
            chunk: the most places that are given at once.

        Returns:
            ``[b, S, H]`` fp32, 0 where a prediction is not valid.

        Raises:
            PluginError: ``number`` returned something else than ``[n]``.
        """
        import torch

        valid = self.targets.valid.flatten(0, 1)
        exact = torch.promote_types(self.trunk.dtype, torch.float32)
        out = torch.zeros(valid.shape, device=valid.device, dtype=exact)
        with torch.no_grad():
            for k, (hidden, unembedding) in enumerate(zip(self.hidden, self.unembeddings, strict=True)):
                states, ids = hidden.flatten(0, 1), self.targets.ids[..., k].flatten()
                for start in range(0, len(ids), chunk):
                    places = slice(start, min(start + chunk, len(ids)))
                    logits = unembedding.logits(states[places]).to(exact)
                    given = number(PredictionChunk(head=k + 1, places=places, logits=logits, ids=ids[places]))
                    if not isinstance(given, torch.Tensor) or given.shape != ids[places].shape:
                        shape = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
                        raise PluginError(f"each_prediction: a chunk of n = {len(ids[places])} places gave {shape}, not [n]")
                    out[places, k] = torch.where(valid[places, k], given.to(exact), 0.0)
        return out.view(self.targets.valid.shape)


class NotComputed(PluginError):
    """A trainer reads something that its class has not asked for.

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
    """A whole optimizer step, as a trainer sees it.

    All rows of all micro-batches and devices, in the order of the data.

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
        """Return uniform weights: ``[B, S, H]`` fp32 ones, which the caller owns."""
        import torch

        ones = torch.ones(self.targets.ids.shape, device=self.targets.ids.device)
        self._uniform.append((ones, ones._version))
        return ones

    def is_uniform(self, weights: Tensor) -> bool:
        """Tell whether ``weights`` are those of `uniform`, unchanged.

        Without waiting for the device.
        """
        return any(weights is ones and ones._version == version for ones, version in self._uniform)

    def by_prediction(self, by_token: Tensor) -> Tensor:
        """Place token values ``[B, S]`` at those tokens' predictions ``[B, S, H]``.

        out[t, k] = by_token[t+k].
        """
        from wmtp.data.batch import shift_to_predictions

        return shift_to_predictions(by_token, self.targets.ids.shape[-1])


class Trainer(TrainerConfig, ABC, contract=True):
    """An algorithm; a subclass writes only what differs from uniform weights.

    Every method has a default. A trainer without state is one class: decorated with ``@attrs.frozen(kw_only=True)``, with a
    ``type`` and its TOML keys as fields, it is its own config class. One with state (running means, modules, other models) has
    a `TrainerConfig` beside it, whose ``build()`` makes it.
    """

    #: `token_weights` uses this step's cross entropy, ``view.token_loss``; may be a property
    needs_token_loss: bool = False
    #: `token_weights` uses the entropy of the model's own predictions, ``view.entropy``; may be a property
    needs_entropy: bool = False
    #: over how many of the most probable tokens that entropy is taken, their probabilities made to add up to 1; None, or as
    #: many as the vocabulary has: over all; may be a property
    entropy_top_k: int | None = None
    _former_methods: ClassVar[Mapping[str, str]] = {"units": "groups", "weighed": "eligible"}

    def build(self) -> Trainer:
        """Return itself: a trainer without state is its own config."""
        return self

    @classmethod
    def contract_problems(cls, instance: Contract | None = None) -> Iterator[str]:
        """See `Contract.contract_problems`; for trainers also what their methods leave out."""
        yield from super().contract_problems(instance)
        yield from flag_problems(cls, instance)
        yield from method_problems(cls, instance)

    def setup(self, setup: TrainerSetup) -> None:
        """Make modules and load other models. Called once, before anything else.

        torch's random numbers come from the run's seed inside. Modules must be the same in every process.
        """

    def modules(self) -> Mapping[str, nn.Module]:
        """Return trained modules besides the model, by name.

        They are saved in checkpoints.
        """
        return {}

    def stages(self) -> Sequence[Stage]:
        """List the stages in order; only the last may omit ``steps``."""
        return (Stage(),)

    def check_data(self, data: TokenDataset) -> Sequence[str]:
        """Report problems of the training data for this algorithm.

        Called before any model is read, and by ``--dry-run``.

        Args:
            data: the training data: labels, rewards, groups and lengths of all pieces, as arrays.

        Returns:
            one line a problem, ``datasets.NAME: what is wrong; what to do``; with any, the run does not start.
        """
        return ()

    def groups(self, data: TokenDataset, stage: Stage) -> NDArray[np.int64] | None:
        """Group pieces that must share an optimizer step; −1 drops one.

        Called once a stage, before `setup`. Stages with the same answer continue in one order of the data; a stage with another
        answer starts an order of its own.

        Args:
            data: the training data.
            stage: one of `stages`, or the head warm-up of the config.

        Returns:
            one number for each piece of ``data``: pieces with the same number share an optimizer step, pieces with −1 are not
            trained on. None: all pieces, each for itself.
        """
        return None

    def learning_rates(self) -> Mapping[str, float]:
        """Return peak learning rates of `modules` that differ from ``optimizer.lr``, by name.

        All follow the same schedule.
        """
        return {}

    def observe(self, view: HiddenView) -> Mapping[str, Tensor]:
        """Return numbers per token from a micro-batch's hidden states.

        ``[b, S]`` or ``[b, S, H]``. Called once a micro-batch, and again for the gradient where auxiliary losses use the
        numbers.
        """
        return {}

    def token_weights(self, view: StepView) -> Tensor:
        """Return the weights of one step: finite, ≥ 0, without gradient.

        Not called in a stage without ``model_loss``.

        Returns:
            ``[B, S]``: a weight for each token, placed at all its predictions; or ``[B, S, H]``: one for each prediction.
            `StepView.uniform`, which is the default, is 1 everywhere. Values at places that are not valid have no effect.
        """
        return view.uniform()

    def eligible(self, view: StepView) -> Tensor | None:
        """Select the valid predictions to learn; the others weigh 0.

        Only these count in ``normalizer = "valid"`` and in what is logged, and a control such as ``shuffled`` deals out weights
        among them.

        Returns:
            ``[B, S, H]`` bool; None: all valid predictions.
        """
        return None

    def auxiliary_losses(self, view: StepView) -> Mapping[str, Tensor]:
        """Return further loss terms: scalars, computed from ``view.observations``."""
        return {}

    def token_details(self, view: StepView) -> Mapping[str, Tensor]:
        """Return numbers per token for ``wmtp report``; default: all observations.

        The report shows them beside weight and loss. Called only in steps whose texts are recorded, after `token_weights` with
        the same view: what that has computed can be kept and returned here. It has no effect on training.

        Returns:
            by name (``reference_loss``, ``value``, ``advantage`` …) ``[B, S]``, a number for each token, or ``[B, S, H]``, one
            for each prediction; NaN where there is none.
        """
        return view.observations

    def metrics(self) -> Mapping[str, Tensor | float]:
        """Return numbers of the last step to log besides the loop's own.

        Tensors are read a step late, without waiting.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state beyond `modules` that a resumed run needs.

        Tensors and plain values.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
