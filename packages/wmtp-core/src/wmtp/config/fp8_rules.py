"""Rules of ``devices.precision = "fp8"`` and ``[devices.fp8]``. Needs neither torch nor torchao."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Final

from wmtp.config.problems import Problem
from wmtp.config.schema import Config, DevicesConfig, Fp8Config, HeadsConfig
from wmtp.spelling import did_you_mean

__all__ = ["fp8_misfits", "fp8_problems"]

#: `wmtp.loss.fp8.PIECE`, without torch
_PIECE: Final = 16
#: heads that a model may bring, at most
_HEADS: Final = 16


def fp8_problems(config: Config) -> Iterator[Problem]:
    """Report settings that exclude fp8, and missing packages."""
    devices = config.devices
    if devices.precision != "fp8":
        if devices.fp8 is not None:
            reason = f'devices.precision = "{devices.precision}" computes nothing in fp8'
            yield Problem(("devices", "fp8"), f"has no effect: {reason}; remove it")
        return
    path = ("devices", "precision")
    emulates = devices.fp8 is not None and devices.fp8.emulate
    if devices.device in ("cpu", "mps") and not emulates:
        yield Problem(
            path,
            f'fp8 needs an NVIDIA GPU, and devices.device = "{devices.device}"; write "bf16-params", or '
            "devices.fp8.emulate = true to try it slowly",
        )
    if devices.fp8 is not None and devices.fp8.recipe == "rowwise" and devices.fp8.accumulates_fast == "all":
        yield Problem(
            ("devices", "fp8", "fast_accumulation"),
            '"all" with recipe = "rowwise" gave numbers on a GPU unlike their emulation; write "forward", or another recipe',
        )
    heads = config.models["base"].heads
    if devices.fp8 is not None and devices.fp8.logits != "none" and heads is not None and heads.objective != "ce":
        yield Problem(
            ("devices", "fp8", "logits"),
            f'models.base.heads.objective = "{heads.objective}" compares logits in bf16; write "none", or objective = "ce"',
        )
    if config.models["base"].quantize is not None:
        yield Problem(
            path, 'models.base.quantize keeps the layers in 4 bits, which fp8 products cannot read; write "bf16-params"'
        )
    recipe = "tensorwise" if devices.fp8 is None else devices.fp8.recipe
    if recipe != "tensorwise" and not config.launcher.remote and find_spec("torchao") is None:
        yield Problem(
            ("devices", "fp8", "recipe"),
            f'"{recipe}" needs torchao: pip install \'wmtp-core[fp8]\', or write "tensorwise", which needs nothing',
        )


def fp8_misfits(
    devices: DevicesConfig, *, hidden_size: int, layers: int, maps: Sequence[str] = (), heads: HeadsConfig | None = None
) -> list[str]:
    """List settings of ``[devices.fp8]`` that a model of this shape excludes.

    Args:
        devices: the config section.
        hidden_size: D. Each map of an ordinary layer reads or writes so many numbers.
        layers: decoder layers.
        maps: linear maps of the decoder layers, by their names in the base; none where they are not known.
        heads: of the config; None: those that the model brings.

    Returns:
        lines ``key: what is wrong; what to do``.
    """
    if devices.precision != "fp8":
        return []
    fp8 = devices.fp8 or Fp8Config()
    problems = []
    if hidden_size % _PIECE:
        problems.append(
            f"devices.precision: fp8 products need hidden states of a multiple of {_PIECE} numbers, and this model has "
            f'{hidden_size}; write "bf16-params"'
        )
    if hidden_size < fp8.min_features:
        problems.append(
            f"devices.fp8.min_features: this model's hidden states have {hidden_size} numbers, and with {fp8.min_features} no "
            'map is left for fp8; write less, or devices.precision = "bf16-params"'
        )
    if (spared := fp8.first_layers + fp8.last_layers) > layers:
        key = "first_layers" if fp8.first_layers else "last_layers"
        problems.append(
            f"devices.fp8.{key}: {spared} decoder layers are to stay in bf16, and this model has {layers}; write less, or "
            'devices.precision = "bf16-params"'
        )
    if not maps:
        return problems
    of_heads = list(_head_maps({name.split(".", 1 + _depth(name))[-1] for name in maps}, heads))
    names = [*(f"base.{name}" for name in maps), *of_heads]
    leaves = sorted({name.rpartition(".")[2] for name in names})
    there = " and ".join([names[0], *of_heads[:1]])
    problems += [
        f"devices.fp8.exclude: {pattern!r} names no linear map of the layers; "
        + (did_you_mean(pattern.rpartition(".")[2], leaves) or f"there are {there}, for example")
        for pattern in fp8.exclude
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    spared = [*range(fp8.first_layers), *range(layers - fp8.last_layers, layers)]
    left = [f"base.{name}" for name in maps if name.split(".")[_depth(name)] not in map(str, spared)] + of_heads
    if not problems and all(any(fnmatchcase(name, pattern) for pattern in fp8.exclude) for name in left):
        problems.append(
            "devices.precision: no linear map of this model is left for fp8; spare fewer layers in devices.fp8, or exclude "
            'less, or write "bf16-params"'
        )
    return problems


def _depth(name: str) -> int:
    """Find the place of a layer's number in a name."""
    return next((place for place, part in enumerate(name.split(".")) if part.isdigit()), 0)


def _head_maps(inner: set[str], heads: HeadsConfig | None) -> Iterator[str]:
    """Name the linear maps that heads 2..H can have (`wmtp.models.heads`)."""
    kind = None if heads is None else heads.kind
    for number in range(_HEADS if heads is None else heads.horizon - 1):
        if kind in ("block", None):
            yield from (f"extra_heads.{number}.{name}" for name in sorted(inner))
        if kind in ("residual", None):
            yield f"extra_heads.{number}.linear"
        if kind in ("chained", "shared", "native", None):
            yield f"extra_heads.{number}.projection"
            yield from (f"extra_heads.{number}.layer.{name}" for name in sorted(inner))
