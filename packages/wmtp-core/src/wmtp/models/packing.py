"""Whether an architecture keeps the documents of a packed row apart, found by trying."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.models.anatomy import Anatomy, evaluating

__all__ = ["packing_problem"]


def packing_problem(anatomy: Anatomy) -> str | None:
    """What goes wrong when two documents share a row, told apart by positions that begin again at 0; None if nothing does.

    Tried on a row of a few tokens: another first document must leave the second one's hidden states as they are, and the
    second one must come out as it does alone.
    """
    decoder = anatomy.decoder
    name = type(decoder).__name__
    weight = next(decoder.parameters())
    vocab_size = anatomy.embedding.num_embeddings

    def ids(start: int, count: int) -> Tensor:
        return (torch.arange(start, start + count, device=weight.device) * 7919).remainder(vocab_size).unsqueeze(0)

    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        return decoder(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state[:, -5:].float()

    document, positions = ids(1, 5), torch.arange(5, device=weight.device).unsqueeze(0)
    packed_positions = torch.cat([positions[:, :3], positions], dim=1)
    with evaluating(decoder):
        try:
            one = run(torch.cat([ids(11, 3), document], dim=1), packed_positions)
            other = run(torch.cat([ids(23, 3), document], dim=1), packed_positions)
            alone = run(document, positions)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"{name} takes no position_ids that begin again inside a row ({type(error).__name__}: {error})"
    size = alone.abs().max()
    # a leak may be small; masked places, on the other hand, add exactly nothing
    if (one - other).abs().max() > 1e-6 * size:
        return f"in {name} a document sees the one before it in the same row"
    if (one - alone).abs().max() > (1e-3 if weight.dtype == torch.float32 else 0.1) * size:
        return f"{name} does not start its positions again with each document of a row"
    return None
