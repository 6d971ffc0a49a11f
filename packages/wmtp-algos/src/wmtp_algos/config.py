"""The config classes of all algorithms. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, le, matches_re, optional

from wmtp.config.components import Component, component, idle_keys

if TYPE_CHECKING:
    from wmtp.training import Trainer

__all__ = [
    "DFT",
    "EAFT",
    "AdaMTP",
    "BaselineMTP",
    "Column",
    "EntropyTop",
    "Focal",
    "HorizonDecay",
    "RandomMatched",
    "Rho1WMTP",
    "Shuffled",
]


@frozen(kw_only=True)
class BaselineMTP:
    """Plain multi-token prediction (Gloeckle et al., arXiv 2404.19737): every prediction counts the same, w = 1."""

    type = "baseline-mtp"

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.baseline_mtp import BaselineMTPTrainer

        return BaselineMTPTrainer()


@frozen(kw_only=True)
class Rho1WMTP:
    """Learns where the model is worse than a reference model (Rho-1: Lin et al., arXiv 2404.07965), at every head.

    The excess loss of head k's prediction of token j = t+k, signed:

        Δ[t, k] = CE[t, k] − CE_ref[j]          CE_ref[j] = −log P_ref(x_j | x_<j)

    CE_ref is the reference's own next-token loss of the token. The reference is the model ``[models.ref]``, frozen: for
    instance the base model after training on a small set of good texts. It must have the base model's vocabulary, which is
    checked token by token. It costs one forward pass a step, and its memory.

    ``mode = "token-skip"`` is Rho-1: the predictions with the highest scores are learned, all others are skipped.
    ``mode = "weighted"`` learns them all, by weights w = softmax(score / temperature) with mean 1.

    Scores are of valid predictions only: padding and prompts count nowhere.

    Args:
        mode: ``weighted`` or ``token-skip``.
        score: ``excess``: Δ; ``absolute``: |Δ|, which learns too what the model does better than the reference;
            ``reference``: −CE_ref, what the reference finds likely. The paper's is ``excess``; the others are to compare.
        scope: what scores compete within: the whole ``batch`` of an optimizer step, each ``sequence`` (a document), or
            each ``head``. Far heads have higher losses than head 1, and so win in a batch.
        keep: token-skip: the share of predictions that is learned (Rho-1: 0.6 at 1B parameters, 0.7 at 7B).
        temperature: weighted: T; the lower, the more the highest scores win.
        min_excess: weighted: a |Δ| below this counts as 0.
        max_weight: weighted: weights are clipped to this.
        reference_precision: of the reference's parameters and products; ``bf16`` needs half the memory.
        reference_device: where the reference computes: ``cpu``, ``cuda``, ``cuda:1`` … Default: where the model does.
        reference_cache: keep CE_ref of every token beside the tokenised data (4 bytes a token), for later epochs and runs;
            once all are known the reference is not even loaded. Other data, another tokenizer or a changed reference start
            anew.
    """

    type = "rho1-wmtp"
    required_models = ("ref",)
    mode: Literal["weighted", "token-skip"] = "weighted"
    score: Literal["excess", "absolute", "reference"] = "excess"
    scope: Literal["batch", "sequence", "head"] = "batch"
    keep: float = field(default=0.6, validator=[gt(0.0), le(1.0)])
    temperature: float = field(default=0.7, validator=gt(0.0))
    min_excess: float = field(default=0.01, validator=ge(0.0))
    max_weight: float = field(default=3.0, validator=ge(1.0))
    reference_precision: Literal["fp32", "bf16"] = "fp32"
    reference_device: str | None = field(default=None, validator=optional(matches_re(r"cpu|mps|cuda(:\d+)?")))
    reference_cache: bool = False

    def check(self) -> Iterator[str]:
        """Name the keys that the mode leaves without effect."""
        if self.mode == "weighted":
            yield from idle_keys(self, ("keep",), 'mode = "weighted" learns every prediction')
        else:
            yield from idle_keys(self, ("temperature", "min_excess", "max_weight"), 'mode = "token-skip" gives weights 0 and 1')
        if self.mode == "weighted" and self.score == "reference":
            yield from idle_keys(self, ("min_excess",), 'score = "reference" is no excess')

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.rho1_wmtp import Rho1WMTPTrainer

        return Rho1WMTPTrainer(self)


@frozen(kw_only=True)
class DFT:
    """Dynamic fine-tuning (Wu et al., arXiv 2508.05629): w = p, the probability that the model gives to the token.

    It cancels the 1/p in the gradient of the cross entropy, so unlikely tokens no longer dominate. Where new facts are to be
    learned, whose tokens *are* unlikely, it does harm.
    """

    type = "dft"

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.dft import DFTTrainer

        return DFTTrainer()


@frozen(kw_only=True)
class Focal:
    """The focal loss (Lin et al., arXiv 1708.02002): w = (1 − p)^γ, so what the model knows already counts less.

    Args:
        gamma: γ; 0 gives the baseline.
    """

    type = "focal"
    gamma: float = field(default=2.0, validator=ge(0.0))

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.focal import FocalTrainer

        return FocalTrainer(self.gamma)


@frozen(kw_only=True)
class HorizonDecay:
    """Far heads count less: w = decay^(k−1) for head k (FastMTP, arXiv 2509.18362, weighs its depths so).

    The same as ``decay`` in ``[models.base.heads]``, as a trainer: to compare with, and to wrap in controls.

    Args:
        decay: the factor from one head to the next; 1 gives the baseline.
    """

    type = "horizon-decay"
    decay: float = field(default=0.6, validator=[gt(0.0), le(1.0)])

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.horizon_decay import HorizonDecayTrainer

        return HorizonDecayTrainer(self.decay)


@frozen(kw_only=True)
class AdaMTP:
    """Learns as far ahead as the text is predictable: w = 1 where k ≤ d_t, else 0, as AdaMTP (arXiv 2608.00434) masks heads.

    How the paper finds d_t was not available to us. This is WMTP's own reading: d_t = 1 + the number of heads, from the first
    on, that all give their targets at least the probability ``confidence``. The first head that is not sure is the last that
    learns there; a target that is not learned (of a prompt) is as if its head were sure. With new heads, warm them up first
    (``warmup_steps`` in ``[models.base.heads]``), as the paper does.

    Args:
        confidence: what counts as sure; 0 gives the baseline.
        min_depth: so many heads learn everywhere.
    """

    type = "adamtp"
    confidence: float = field(default=0.5, validator=[ge(0.0), le(1.0)])
    min_depth: int = field(default=1, validator=ge(1))

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.adamtp import AdaMTPTrainer

        return AdaMTPTrainer(self.confidence, self.min_depth)


@frozen(kw_only=True)
class Column:
    """The data's own token weights: a token's weight counts at every head that predicts it.

    Documents without weights have weight 1; data in which no document has any is refused.
    """

    type = "column"

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.column import ColumnTrainer

        return ColumnTrainer()


@frozen(kw_only=True)
class EAFT:
    """Entropy-adaptive fine-tuning (Diao et al., arXiv 2601.02151): w = H / log K.

    H is the entropy of the model's K most probable tokens, made to add up to 1. Where the model is sure, and the data says
    something else, little is learned; so less is forgotten.

    Args:
        top_k: K.
    """

    type = "eaft"
    top_k: int = field(default=20, validator=ge(2))

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.eaft import EAFTTrainer

        return EAFTTrainer(self.top_k)


@frozen(kw_only=True)
class EntropyTop:
    """Learns where the model is unsure: w = 1 for the share of predictions with the highest entropy, else 0.

    Wang et al. (arXiv 2506.01939) do so in reinforcement learning, with ρ = 0.2.

    Args:
        keep: ρ, the share that is learned.
        scope: what predictions compete within: the whole ``batch`` of an optimizer step, each ``sequence`` (a document), or
            each ``head``. Far heads are less sure than head 1, and so win in a batch.
    """

    type = "entropy-top"
    keep: float = field(default=0.2, validator=[gt(0.0), le(1.0)])
    scope: Literal["batch", "sequence", "head"] = "batch"

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp_algos.entropy_top import EntropyTopTrainer

        return EntropyTopTrainer(self.keep, self.scope)


@frozen(kw_only=True)
class Shuffled:
    """A control: another trainer's weights, dealt out at random to the predictions of the same head.

    Every head keeps exactly the weights that it has in the treatment, so mean, spread and zeros are the same; only which
    prediction gets which is left to chance. If this learns as well as the treatment, the assignment was of no use.

    Args:
        of: the treatment: any trainer, in the table ``[trainer.of]``.
    """

    type = "shuffled"
    of: Component = component("trainers")

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp.training.setup import provenance
        from wmtp_algos.shuffled import ShuffledTrainer

        return ShuffledTrainer(self.of.build(), provenance(self.of))


@frozen(kw_only=True)
class RandomMatched:
    """A control: random weights that have, at each head, the mean and the standard deviation of another trainer's weights.

    They are log-normal, so unlike `Shuffled` it replaces the shape of the distribution too: none is 0.

    Args:
        of: the treatment: any trainer, in the table ``[trainer.of]``.
    """

    type = "random-matched"
    of: Component = component("trainers")

    def build(self) -> Trainer:
        """Make the trainer."""
        from wmtp.training.setup import provenance
        from wmtp_algos.random_matched import RandomMatchedTrainer

        return RandomMatchedTrainer(self.of.build(), provenance(self.of))
