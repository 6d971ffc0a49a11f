"""Names of what ``[data.eval]`` measures, as far as a config tells."""

from __future__ import annotations

from typing import Final

from wmtp.config.schema import Config
from wmtp.spelling import did_you_mean

__all__ = ["eval_metric_problem", "eval_metrics"]

#: H where only the model tells it
_MOST_HEADS: Final = 64


def eval_metrics(config: Config) -> list[str]:
    """Name every metric that an evaluation can log.

    Where the number of heads is the model's, more than it has. Empty without ``[data.eval]``.
    """
    if config.data.eval is None:
        return []
    heads = config.models["base"].heads if "base" in config.models else None
    horizon = _MOST_HEADS if heads is None else heads.horizon
    names = ["eval/loss", *(f"eval/loss/head_{k}" for k in range(1, horizon + 1)), "eval/predictions"]
    if horizon > 1:  # `wmtp.training.agreement.DraftSums`
        names += [f"eval/{name}/head_{k}" for name in ("acceptance", "top1") for k in range(2, horizon + 1)]
        names += [f"eval/accepted/depth_{d}" for d in range(1, horizon)] + ["eval/tokens_per_forward"]
    return names


def eval_metric_problem(name: str, config: Config) -> str | None:
    """Say why no evaluation logs a metric of this name.

    Nothing else can: a trainer's own metrics do not begin with ``eval/``.
    """
    if config.data.eval is None:
        return f"{name!r} is measured on [data.eval], which is missing; add it"
    known = eval_metrics(config)
    if name in known:
        return None
    heads = config.models["base"].heads if "base" in config.models else None
    some = "'eval/loss', 'eval/loss/head_1'"
    if heads is not None and heads.horizon > 1:
        some += ", 'eval/acceptance/head_2', 'eval/tokens_per_forward'"
    return f"{name!r} is no metric of [data.eval]; {did_you_mean(name, known) or f'there are {some} and others'}"
