"""dft: weight each token by the probability that the model gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from wmtp import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from wmtp import StepView

__all__ = ["DFT"]


@frozen(kw_only=True)
class DFT(Trainer):
    """Dynamic fine-tuning (Wu et al., arXiv 2508.05629): w = p.

    p is the probability that the model gives to the token: w[t, k] = P_k(x[t+k] | x_≤t) = exp(−CE[t, k]).

    The weight cancels the 1/p in the gradient of the cross entropy, so unlikely tokens no longer dominate. Where new facts are
    to be learned, whose tokens *are* unlikely, it does harm. Published with the mean over tokens: set
    ``train.normalizer = "valid"``. With ``sum_w`` the steps are several times as large, and the model may collapse onto what is
    certain already; `asft` anchors it.
    """

    type = "dft"
    published_normalizer = "valid"
    needs_token_loss = True

    def token_weights(self, view: StepView) -> Tensor:
        """Return a weight for each prediction, ``[B, S, H]``."""
        return (-view.token_loss).exp()
