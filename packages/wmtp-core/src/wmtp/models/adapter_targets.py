"""Settings of an adapter: which modules of a model it goes into.

They come from ``[models.base.lora]``, or from the files of an adapter.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wmtp.config.adapter_rules import other_settings
from wmtp.config.problems import dotted
from wmtp.config.schema import LoraConfig
from wmtp.errors import ConfigError, FileError
from wmtp.models.anatomy import find_layers
from wmtp.models.quantized import quiet_bitsandbytes
from wmtp.spelling import did_you_mean

__all__ = ["check_same", "check_targets", "log_own_settings", "make_peft_config", "resolve_targets", "targets_within"]

_log = logging.getLogger("wmtp")


def resolve_targets(base: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Name the modules that ``lora.targets`` means.

    Names match as in PEFT: whole, or by their end after a dot.

    Args:
        base: may be on the meta device.
        lora: the config's ``[models.base.lora]``.

    Raises:
        ConfigError: a name is none of a linear map in the decoder layers, or the rank is more than any of them can have.
    """
    layers = find_layers(base, base.base_model, lambda reason: ConfigError(f"models.base.lora: {reason}"))
    inside = {id(module) for module in layers.modules()}
    modules = dict(base.named_modules())
    maps = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D) and id(module) in inside]
    if not maps:
        raise ConfigError(
            "models.base.lora: the decoder layers of this model have no linear maps, so there is nothing to adapt"
        )
    # a number alone would mean layers too
    leaves = sorted({name if (leaf := name.rpartition(".")[2]).isdigit() else leaf for name in maps})
    wanted = leaves if lora.targets == "all-linear" else list(dict.fromkeys(lora.targets))
    problems, known = [], set(maps)
    largest = 0
    for index, target in enumerate(wanted):
        matched = [name for name in modules if name and (name == target or name.endswith(f".{target}"))]
        if matched and known.issuperset(matched):
            largest = max(largest, *(min(modules[name].weight.shape) for name in matched))  # type: ignore[arg-type]
            continue
        problems.append(f"models.base.lora.targets.{index}: {_no_target(base, target, matched, modules, leaves)}")
    if lora.rank > largest > 0:
        problems.append(
            f"models.base.lora.rank: {lora.rank}, but rank {largest} holds every change of the largest adapted map already; "
            "lower it"
        )
    if problems:
        raise ConfigError(problems)
    return wanted


def targets_within(heads: nn.Module, targets: Collection[str]) -> list[str]:
    """Find the targets that are in heads 2..H.

    Args:
        heads: a list of them, or of layers like theirs.
        targets: as `resolve_targets` gives them.

    Raises:
        ConfigError: none is.
    """
    names = [name for name, module in heads.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    found = [target for target in targets if any(name.endswith(f".{target}") for name in names)]
    if not found:
        raise ConfigError(
            f"models.base.lora.heads: none of {', '.join(sorted(targets))} is in the heads' layers; name linear "
            'maps without their layer in models.base.lora.targets, or write heads = "full"'
        )
    return found


def _no_target(
    base: PreTrainedModel, target: str, matched: list[str], modules: Mapping[str, nn.Module], leaves: list[str]
) -> str:
    there = f"there are: {', '.join(leaves)}"
    if any(modules[name] is base.get_output_embeddings() for name in matched):
        tied = " (and is the embedding too: they are tied)" if base.config.tie_word_embeddings else ""
        return f"{target!r} is the unembedding, which all heads share{tied}; it stays as it is: leave it out"
    if any(tensor.ndim == 3 and f".{name}".endswith(f".{target}") for name, tensor in base.named_parameters()):
        return f"{target!r} are weights of experts, which are no linear maps and get no adapters; {there}"
    if matched:
        kind = type(modules[matched[0]]).__name__
        return f"{target!r} means {matched[0]} ({kind}), which is no linear map of the decoder layers; {there}"
    return f"{target!r} is no linear map of this model; {did_you_mean(target, leaves) or there}"


def make_peft_config(base: PreTrainedModel, lora: LoraConfig) -> Any:
    """Write ``[models.base.lora]`` as peft's ``LoraConfig``.

    Raises:
        ConfigError: see `resolve_targets`.
    """
    with quiet_bitsandbytes():
        import peft

    alpha = lora.resolved_alpha
    targets = resolve_targets(base, lora)
    kinds = {type(module) for name, module in base.named_modules() if any(f".{name}".endswith(f".{t}") for t in targets)}
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # a number is enough
        target_modules=targets,
        lora_dropout=0.0,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        fan_in_fan_out=kinds == {Conv1D},
        task_type="CAUSAL_LM",
    )


def check_same(config: Any, lora: LoraConfig, quantize: str | None, base: PreTrainedModel, folder: Path) -> None:
    """Refuse to train an adapter further under other settings than its own.

    Args:
        config: peft's, of the adapter that the files hold.
        lora: the config's ``[models.base.lora]``.
        quantize: the config's ``models.base.quantize``.
        base: the model, before the adapter is on it.
        folder: of the adapter.

    Raises:
        ConfigError: they differ.
    """
    ours = make_peft_config(base, lora)
    problems = [f"{dotted(problem.path)}: {problem.message}" for problem in other_settings(folder, lora, quantize)]
    if (names := _matched(base, config)) != _matched(base, ours):
        new, own = sorted(ours.target_modules), _short(config.target_modules)
        own = own if new != own else sorted(names)  # of some layers alone
        problems.append(
            f"models.base.lora.targets: {new!r}, but the adapter in {folder} has {own!r}; write that, or merge it first: "
            "wmtp export --format wmtp"
        )
    if problems:
        raise ConfigError(problems)


def log_own_settings(config: Any, folder: Path) -> None:
    """Log which settings of its own an adapter drops or keeps.

    Args:
        config: peft's, of the adapter that the files hold.
        folder: of the adapter.
    """
    if config.lora_dropout:
        _log.info("models.base.lora: the adapter in %s had dropout %s; it goes on without", folder, config.lora_dropout)
    for key in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, key):
            _log.info("models.base.lora: the adapter in %s keeps its %s: %s", folder, key, pattern)


def check_targets(config: Any, base: PreTrainedModel, source: object) -> None:
    """Refuse an adapter outside the linear maps of the decoder layers.

    Args:
        config: peft's.
        base: the model, before the adapter is on it.
        source: what messages call the adapter.

    Raises:
        WMTPError: it is, or its targets are nowhere in the model.
    """
    if config.target_modules == "all-linear":  # which peft means so
        return
    names = _matched(base, config)
    targets = ", ".join(_short(config.target_modules))
    if not names:
        raise FileError(f"{source}: the targets of the adapter ({targets}) are nowhere in its base")
    layers = find_layers(base, base.base_model, lambda reason: ConfigError(f"{source}: {reason}"))
    inside = {id(module) for module in layers.modules()}
    if others := sorted(name for name in names if id(base.get_submodule(name)) not in inside):
        raise FileError(
            f"{source}: the adapter is on {', '.join(others)} too, and all heads share what is outside of the decoder layers; "
            "merge it into its base with PEFT's merge_and_unload(), and name the folder that you save then"
        )


def _matched(base: nn.Module, config: Any) -> set[str]:
    """Name the modules that an adapter is on."""
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        return {name for name, _ in base.named_modules() if name and check_target_module_exists(config, name)}
    except re.error as error:
        raise FileError(f"the targets of the adapter, {config.target_modules!r}, are no pattern: {error}") from error


def _short(targets: Any) -> list[str]:
    """Shorten targets for a message.

    PEFT writes all-linear as the full name of each map.
    """
    return [targets] if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets or ()})
