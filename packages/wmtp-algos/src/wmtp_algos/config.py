"""Config classes of algorithms with state, and of controls. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, le, lt, matches_re, optional

from wmtp import TrainerConfig
from wmtp.plugins.components import component, idle_keys

if TYPE_CHECKING:
    from wmtp.trainers import Trainer

__all__ = ["IS_DEVICE", "RandomMatched", "Rho1WMTP", "Shuffled"]

#: validates ``reference_device``
IS_DEVICE: Final = optional(matches_re(r"cpu|mps|cuda(:\d+)?"))


@frozen(kw_only=True)
class Rho1WMTP(TrainerConfig):
    """Selection by excess loss against a reference model, at every head.

    Learns where the model is worse than the reference (Rho-1: Lin et al., arXiv 2404.07965). The excess loss of head k's
    prediction of token j = t+k, signed:

        Δ[t, k] = CE[t, k] − CE_ref[j]          CE_ref[j] = −log P_ref(x_j | x_<j)

    CE_ref is the reference's own next-token loss of the token. The reference is the model ``[models.ref]``, frozen: for
    instance the base model after training on a small set of good texts. It must have the base model's vocabulary, which is
    checked token by token. It costs one forward pass a step, and its memory.

    ``mode = "token-skip"`` is Rho-1: the predictions with the highest scores are learned, all others are skipped.
    ``mode = "weighted"`` learns them all, by weights w = softmax(score / temperature) with mean 1; it did worse in what was
    measured.

    Scores are of valid predictions only: padding and prompts count nowhere.

    Args:
        mode: ``token-skip`` or ``weighted``.
        score: ``excess``: Δ; ``absolute``: |Δ|, which learns too what the model does better than the reference;
            ``reference``: −CE_ref, what the reference finds likely. The paper's is ``excess``; the others are to compare.
        scope: what scores compete within: the whole ``batch`` of an optimizer step, each ``sequence`` (a document), or
            each ``head``. Far heads have higher losses than head 1, and so win in a batch; where they are new, head 1 has no
            weight left there. With one head ``batch`` and ``head`` are the same.
        keep: token-skip: the share of predictions that is learned (Rho-1: 0.6 at 1B parameters, 0.7 at 7B).
        temperature: weighted: T; the lower, the more the highest scores win.
        min_ess_share: weighted: where the effective sample (Σw)² / Σw² of a scope, w clipped, would be a smaller share of its
            predictions, T is raised until it is this share: excess losses of heads that are new, or of another reference, are
            many times 0.7 apart, and a few predictions would have all weight. 0: never.
        min_excess: weighted: a |Δ| below this counts as 0.
        max_weight: weighted: weights are clipped to this, and then divided by their mean, which clipping has made smaller.
        reference_precision: of the reference's parameters and products; ``bf16`` needs half the memory.
        reference_device: where the reference computes: ``cpu``, ``cuda``, ``cuda:1`` … Default: where the model does.
        reference_cache: keep CE_ref of every token beside the tokenized data (4 bytes a token), for later epochs and runs;
            once all are known the reference is not even loaded. Other data, another tokenizer or a changed reference start
            anew.
    """

    type = "rho1-wmtp"
    required_models = ("ref",)
    mode: Literal["token-skip", "weighted"] = "token-skip"
    score: Literal["excess", "absolute", "reference"] = "excess"
    scope: Literal["batch", "sequence", "head"] = "head"
    keep: float = field(default=0.6, validator=[gt(0.0), le(1.0)])
    temperature: float = field(default=0.7, validator=gt(0.0))
    min_ess_share: float = field(default=0.1, validator=[ge(0.0), lt(1.0)])
    min_excess: float = field(default=0.01, validator=ge(0.0))
    max_weight: float = field(default=3.0, validator=ge(1.0))
    reference_precision: Literal["fp32", "bf16"] = "fp32"
    reference_device: str | None = field(default=None, validator=IS_DEVICE)
    reference_cache: bool = False

    def check(self) -> Iterator[str]:
        """Name the keys that the mode leaves without effect."""
        if self.mode == "weighted":
            yield from idle_keys(self, ("keep",), 'mode = "weighted" learns every prediction')
        else:
            weighted = ("temperature", "min_ess_share", "min_excess", "max_weight")
            yield from idle_keys(self, weighted, 'mode = "token-skip" gives weights 0 and 1')
        if self.mode == "weighted" and self.score == "reference":
            yield from idle_keys(self, ("min_excess",), 'score = "reference" is no excess')

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.rho1_wmtp import Rho1WMTPTrainer

        return Rho1WMTPTrainer(self)


@frozen(kw_only=True)
class Shuffled(TrainerConfig):
    """A control: another trainer's weights, dealt out at random within each head.

    Every head keeps exactly the weights that it has in the treatment, so mean, spread and zeros are the same; only which
    prediction gets which is left to chance. If this learns as well as the treatment, the assignment was of no use.

    Args:
        of: the treatment: any trainer, in the table ``[trainer.of]``.
    """

    type = "shuffled"
    of: TrainerConfig = component("trainers")

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp.training.setup import build_trainer
        from wmtp_algos.shuffled import ShuffledTrainer

        return ShuffledTrainer(*build_trainer(self.of))


@frozen(kw_only=True)
class RandomMatched(TrainerConfig):
    """A control: random weights with another trainer's mean and spread, per head.

    At each head they have the mean and the standard deviation of the treatment's weights. They are log-normal, so unlike
    `Shuffled` it replaces the shape of the distribution too: none is 0.

    Args:
        of: the treatment: any trainer, in the table ``[trainer.of]``.
    """

    type = "random-matched"
    of: TrainerConfig = component("trainers")

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp.training.setup import build_trainer
        from wmtp_algos.random_matched import RandomMatchedTrainer

        return RandomMatchedTrainer(*build_trainer(self.of))
