"""Sums of the agreement of heads 2..H with head 1.

They are taken over a step, or over the evaluation data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.loss import HeadAgreement, HeadLoss
from wmtp.loss.weights import statistics_dtype

__all__ = ["AgreementSums", "DraftSums", "decoding_steps"]


class AgreementSums:
    """Objective and agreement of the predictions that a step learns, by head.

    Args:
        horizon: H.
        device: where the numbers are.
    """

    def __init__(self, horizon: int, device: torch.device) -> None:
        #: of heads 2..H: c · objective, c, overlap, same_top, count; to be added up over ranks
        self.sums = torch.zeros(5, horizon - 1, dtype=statistics_dtype(device), device=device)

    def add(self, found: HeadLoss, coefficients: Tensor) -> None:
        """Add a micro-batch, of which ``coefficients`` ``[b, S, H]`` learn."""
        c = coefficients[..., 1:].to(self.sums.dtype)
        learned = c != 0
        agreement = found.agreement
        numbers = (
            c * found.values[..., 1:],
            c,
            learned * agreement.overlap[..., 1:],
            learned & agreement.same_top[..., 1:],
            learned,
        )
        self.sums += torch.stack([number.to(self.sums.dtype).sum((0, 1)) for number in numbers])

    def means(self) -> dict[str, Tensor]:
        """Compute the means by head; NaN where nothing learns.

        ``objective/head_k`` is the mean by weight; ``acceptance/head_k`` and ``top1/head_k`` are those over all that learns.
        """
        objective, total, overlap, same_top, count = self.sums
        by_name = {"objective": objective / total, "acceptance": overlap / count, "top1": same_top / count}
        return {f"{name}/head_{k}": value[k - 2] for name, value in by_name.items() for k in range(2, len(total) + 2)}


class DraftSums:
    """Drafts of heads 2..H, and those that head 1 would accept.

    All are drafts of given texts.

    Args:
        horizon: H.
        device: where the numbers are.
    """

    def __init__(self, horizon: int, device: torch.device) -> None:
        self._extra = horizon - 1
        #: of heads 2..H: overlap, same_top, count; accepted up to this depth, and positions with so many drafts. Then two
        #: columns of which the first row alone is used: tokens that decoding would write, and its forward passes
        self.sums = torch.zeros(5, horizon + 1, dtype=statistics_dtype(device), device=device)

    def add(self, found: HeadAgreement, valid: Tensor) -> None:
        """Add a batch, measured at the predictions ``valid`` ``[B, S, H]``."""
        drafted = valid.cumprod(dim=-1)[..., 1:]
        accepted = (valid & found.same_top).cumprod(dim=-1)[..., 1:]
        numbers = (found.overlap[..., 1:], found.same_top[..., 1:], valid[..., 1:], accepted, drafted)
        self.sums[:, : self._extra] += torch.stack([number.to(self.sums.dtype).sum((0, 1)) for number in numbers])
        walked = decoding_steps(valid[..., 0], accepted.sum(-1))
        self.sums[0, self._extra :] += torch.stack(walked).to(self.sums.dtype)

    def means(self) -> dict[str, Tensor]:
        """Make numbers of the sums.

        Returns:
            ``acceptance/head_k``: mean Σ min(p, q), the expected acceptance of a draft that is sampled; ``top1/head_k``: the
            share of tokens of which head k and head 1 find the same the most probable; ``accepted/depth_d``: the share of
            positions at which the first d greedy drafts are all accepted; ``tokens_per_forward``: of greedy decoding that goes
            along the text, each step from where the one before it ended. All are of the given text: of the model's own text
            they are those of decoding.
        """
        overlap, same_top, count, accepted, drafted = self.sums[:, : self._extra]
        tokens, steps = self.sums[0, self._extra :]
        depths = accepted / drafted
        by_head = {"acceptance": overlap / count, "top1": same_top / count}
        found = {f"{name}/head_{k}": value[k - 2] for name, value in by_head.items() for k in range(2, len(count) + 2)}
        found |= {f"accepted/depth_{d}": depths[d - 1] for d in range(1, len(count) + 1)}
        return found | {"tokens_per_forward": tokens / steps}


def decoding_steps(valid: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
    """Count tokens that decoding would write along texts, and forward passes.

    A mean over all positions would be too high: drafts fail where text is hard, and decoding stops at more positions there. As
    in `wmtp.Generation`, the first token of a text comes from reading its prompt and is not counted.

    Args:
        valid: ``[B, S]`` bool, the next token is one to write. Gaps separate texts.
        accepted: ``[B, S]``, drafts after the next token that would be accepted.

    Returns:
        both as one number.
    """
    length = valid.shape[1]
    before = torch.nn.functional.pad(valid[:, :-1], (1, 0))
    reached = torch.nn.functional.pad(valid & ~before, (0, 1))
    tokens = valid.sum() - reached.sum()
    end = torch.full_like(accepted[:, :1], length)
    places = torch.arange(length, device=valid.device) + 1 + accepted
    following = torch.cat([torch.where(valid, places, length).clamp(max=length), end], dim=1)
    for _ in range(length.bit_length()):  # after n rounds: all that fewer than 2^n steps reach
        arrivals = torch.zeros_like(following).scatter_add(1, following, reached.to(following.dtype))
        reached = reached | (arrivals > 0)
        following = following.gather(1, following)
    passes = reached[:, :-1] & valid & torch.nn.functional.pad(valid[:, 1:], (0, 1))
    return tokens, passes.sum()
