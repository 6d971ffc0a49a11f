"""Refusal of keys that other keys leave without effect.

No setting is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from attrs import evolve

from wmtp.config.problems import KeyPath, Problem
from wmtp.config.schema import Config, HeadsConfig
from wmtp.plugins.components import idle_keys

__all__ = ["idle_problems"]

_WITHOUT_LAYOUT: Final = ("block", "linear", "residual", "native")
#: keys of heads 2..H
_OF_FURTHER_HEADS: Final = (
    *("kind", "layout", "init", "trunk_gradient", "head_weights", "decay", "objective", "draft_vocabulary", "lr_factor"),
)


def idle_problems(config: Config) -> Iterator[Problem]:
    """Report changed keys of the core's sections without effect."""
    base = config.models.get("base")
    if base is not None and base.heads is not None:
        yield from _idle_in_heads(base.heads, ("models", "base", "heads"))
    if config.schedule.type == "constant":
        yield from _idle(config.schedule, ("min_ratio",), ("schedule",), 'type = "constant" does not decay')
    fsdp = config.devices.fsdp
    if fsdp is not None and fsdp.strategy == "none":
        reason = 'strategy = "none" adds up gradients once a step'
        yield from _idle(fsdp, ("reduce_every_micro_batch",), ("devices", "fsdp"), reason)
    if config.report.samples == 0:
        yield from _idle(config.report, ("sample_interval", "sample_tokens"), ("report",), "samples = 0 records no tokens")


def _idle_in_heads(heads: HeadsConfig, path: KeyPath) -> Iterator[Problem]:
    if heads.objective != "lk":
        yield from _idle(heads, ("lk_eta",), path, f'objective = "{heads.objective}" has no η')
    if heads.horizon > 1 and heads.kind in _WITHOUT_LAYOUT:
        reason = f'kind = "{heads.kind}" has no layout to choose; "chained" and "shared" have'
        yield from _idle(heads, ("layout",), path, reason)
    if heads.horizon == 1:
        heads = evolve(heads, decay=None) if heads.decay == 1.0 else heads  # so that an overlay can undo it
        yield from _idle(heads, _OF_FURTHER_HEADS, path, "horizon = 1 is the model's own head alone")


def _idle(section: Any, keys: tuple[str, ...], path: KeyPath, reason: str) -> Iterator[Problem]:
    for line in idle_keys(section, keys, reason):
        yield Problem.of_line(line, *path)
