"""Token accuracy and entropy, from hidden states already computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from wmtp.loss.cross_entropy import token_pass
from wmtp.loss.unembedding import Unembedding

__all__ = ["PredictionSums"]

#: logits that are held at once; on a GPU fewer and larger products
_LOGITS: Final = {"cpu": 2**24, "cuda": 2**26}


class PredictionSums:
    """Sums over predictions: correct and all by head, head 1's entropy.

    Args:
        horizon: H.
        device: where the hidden states are.
    """

    def __init__(self, horizon: int, device: torch.device) -> None:
        #: ``[3, H]``: right predictions, all, entropy in nats (of head 1 alone); to be added up over ranks
        self.sums = torch.zeros(3, horizon, device=device)

    @torch.no_grad()
    def add(self, hidden: Sequence[Tensor], unembeddings: Sequence[Unembedding], ids: Tensor, valid: Tensor) -> None:
        """Add predictions, a chunk of logits at a time.

        Args:
            hidden: one ``[B, S, D]`` a head.
            unembeddings: one a head.
            ids: ``[B, S, H]``, the targets.
            valid: ``[B, S, H]``.
        """
        most = _LOGITS.get(ids.device.type, _LOGITS["cpu"])
        for head, (states, unembedding) in enumerate(zip(hidden, unembeddings, strict=True)):
            rows = max(1, most // len(unembedding.weight))
            parts = zip(states.detach().flatten(0, 1).split(rows), ids[..., head].flatten().split(rows), strict=True)
            right = torch.cat([unembedding.logits(chunk).argmax(-1) == wanted for chunk, wanted in parts])
            counted = valid[..., head].flatten()
            self.sums[0, head] += (right & counted).sum()
            self.sums[1, head] += counted.sum()
        entropy = token_pass(hidden[:1], unembeddings[:1], ids[..., :1], valid[..., :1], entropy=True).entropy
        assert entropy is not None, "it was asked for"
        self.sums[2, 0] += entropy.sum()

    def means(self) -> dict[str, Tensor]:
        """Make ``accuracy/head_k`` and ``entropy/head_1``; NaN for a head without predictions."""
        right, all_, entropy = self.sums
        found = {f"accuracy/head_{k + 1}": right[k] / all_[k] for k in range(len(right))}
        return found | {"entropy/head_1": entropy[0] / all_[0]}
