"""The loss of multi-token prediction: see docs/loss.md."""

from wmtp.loss.cross_entropy import TokenPass, token_losses, token_pass, token_statistics, weighted_cross_entropy
from wmtp.loss.unembedding import Unembedding

__all__ = ["TokenPass", "Unembedding", "token_losses", "token_pass", "token_statistics", "weighted_cross_entropy"]
