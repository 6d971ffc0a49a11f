"""Low-rank adapters (LoRA, arXiv 2106.09685), by PEFT.

They go into the decoder layers of a model, and into those of its heads where asked for. peft puts a module of its own in the
place of each linear map, with the map inside, so that forward passes, compiled layers and sharding see ordinary layers. Names
of parameters are peft's; those that learn have a part that begins with ``lora_``.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import frozen
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wmtp.config.schema import LoraConfig
from wmtp.errors import ConfigError, FileError
from wmtp.models.anatomy import find_layers
from wmtp.models.drawing import seeded
from wmtp.models.fp8_frozen import check_original
from wmtp.models.quantized import dequantize_layers, quantize_layers
from wmtp.models.tensor_fit import misfits
from wmtp.spelling import did_you_mean

if TYPE_CHECKING:
    from wmtp.models.mtp import MTPModel

__all__ = [
    "Adapter",
    "BaseModelName",
    "adapter_off",
    "check_same",
    "check_targets",
    "fingerprint",
    "inject",
    "is_adapter_name",
    "make_peft_config",
    "merge",
    "put_on",
    "quantize_base",
    "resolve_targets",
    "saved_name",
    "split_state",
]

#: peft's name of the one adapter
_NAME = "default"
_SAMPLES = 64
_log = logging.getLogger("wmtp")


@frozen(kw_only=True)
class BaseModelName:
    """Name of the model that an adapter belongs to.

    Args:
        name: what peft shall open: ``org/name`` of the hub, or a local path.
        revision: of the hub.
        uri: what the run's config had as ``models.base.uri``.
    """

    name: str
    revision: str | None = None
    uri: str | None = None


@frozen(kw_only=True, eq=False)
class Adapter:
    """Adapter of a model.

    Args:
        config: peft's ``LoraConfig``, whose targets are names of modules.
        base: the model that it belongs to; None where it is of no file.
        fingerprint: of that model's numbers; see `fingerprint`.
        quantize: how the weights of its layers are kept while the adapter learns; None: as they are.
        in_heads: heads 2..H have adapters of their own, and learn nothing else.
    """

    config: Any
    base: BaseModelName | None
    fingerprint: str
    quantize: Literal["nf4"] | None = None
    in_heads: bool = False


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


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Silence bitsandbytes, imported by peft, about kernels that are not used."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def make_peft_config(base: PreTrainedModel, lora: LoraConfig) -> Any:
    """Write ``[models.base.lora]`` as peft's ``LoraConfig``.

    Raises:
        ConfigError: see `resolve_targets`.
    """
    with _quiet_import():
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


def put_on(
    model: MTPModel,
    config: Any,
    *,
    seed: int,
    base: BaseModelName | None = None,
    state: Mapping[str, Tensor] | None = None,
    known: str | None = None,
    quantize: Literal["nf4"] | None = None,
    in_heads: bool = False,
    head_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Add an adapter to a model's own layers.

    From now on nothing but the adapter and heads 2..H can learn.

    Args:
        model: in place; may be on the meta device.
        config: peft's ``LoraConfig``.
        seed: of a new adapter, which changes nothing until it has learned.
        base: the model that the adapter belongs to.
        state: the adapter's tensors, by `saved_name`. Default: a new adapter.
        known: the fingerprint of the model, where its numbers are not here.
        quantize: how its weights shall be kept; see `quantize_base`.
        in_heads: put adapters of the same settings into heads 2..H as well, which then learn nothing else.
        head_state: the tensors of these, by `saved_name`. Default: new ones.

    Raises:
        WMTPError: the tensors do not fit.
        ConfigError: no target is in the heads.
    """
    numbers = known or fingerprint(model.base)
    config.lora_dropout = 0.0  # weights and loss of a step are of one forward pass
    with seeded(seed):
        inject(model.base, config, state)
        if in_heads:
            inject(model.extra_heads, _config_within(model.extra_heads, config), head_state)
    config.base_model_name_or_path = None if base is None else base.name
    config.revision = None if base is None else base.revision
    model.adapter = Adapter(config=config, base=base, fingerprint=numbers, quantize=quantize, in_heads=in_heads)


def _config_within(heads: nn.Module, config: Any) -> Any:
    """Narrow an adapter's settings to the targets in the heads.

    A target that names a single layer of the base is in none of them.
    """
    names = [name for name, module in heads.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    targets = [target for target in config.target_modules if any(name.endswith(f".{target}") for name in names)]
    if not targets:
        raise ConfigError(
            f"models.base.lora.heads: none of {', '.join(sorted(config.target_modules))} is in the heads' layers; name linear "
            'maps without their layer in models.base.lora.targets, or write heads = "full"'
        )
    own = copy.copy(config)
    own.target_modules = targets
    return own


def quantize_base(model: MTPModel, device: torch.device | None = None) -> None:
    """Quantize the base as its adapter asks.

    Heads 2..H and the adapter itself stay as they are.

    Args:
        model: in place.
        device: where weights are quantized, one at a time. Default: where they are.
    """
    if model.adapter is not None and model.adapter.quantize is not None:
        quantize_layers(model.base, device or model.anatomy.output.weight.device)


def inject(base: nn.Module, config: Any, state: Mapping[str, Tensor] | None = None) -> None:
    """Have PEFT add its modules to a model, and fill them.

    ``base`` may be a part of a model.

    Args:
        base: in place; may be on the meta device.
        config: peft's ``LoraConfig``.
        state: as for `put_on`. Default: torch's random numbers.

    Raises:
        WMTPError: the tensors do not fit.
    """
    with _quiet_import():
        import peft

        from wmtp.models.low_rank_layers import use_one_operator

    training, is_meta = base.training, any(parameter.is_meta for parameter in base.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # intended, or refused before
        peft.inject_adapter_in_model(config, base, adapter_name=_NAME, low_cpu_mem_usage=is_meta)
    base.train(training)
    use_one_operator(base)
    if not isinstance(config.target_modules, str):  # a pattern stays
        config.target_modules = sorted(config.target_modules)
    if state is not None:
        _fill(base, state)


def check_same(config: Any, lora: LoraConfig, base: PreTrainedModel, source: object, *, in_heads: bool) -> None:
    """Refuse to train an adapter further under other settings than its own.

    Args:
        config: peft's, of the adapter that the files hold.
        lora: the config's ``[models.base.lora]``.
        base: the model, before the adapter is on it.
        source: what messages call the adapter.
        in_heads: the files hold adapters of heads 2..H.

    Raises:
        ConfigError: they differ.
    """
    wanted = make_peft_config(base, lora)
    own: dict[str, tuple[Any, Any]] = {
        "rank": (wanted.r, config.r),
        "alpha": (wanted.lora_alpha, config.lora_alpha),
        "dora": (wanted.use_dora, config.use_dora),
        "rslora": (wanted.use_rslora, config.use_rslora),
        "heads": (lora.heads, "adapters" if in_heads else "full"),
    }
    if (names := _matched(base, config)) != _matched(base, wanted):
        known = sorted(wanted.target_modules), _short(config.target_modules)
        own["targets"] = known if known[0] != known[1] else (known[0], sorted(names))  # of some layers alone
    problems = [
        f"models.base.lora.{key}: {new!r}, but the adapter in {source} has {old!r}; write that, or merge it first: "
        "wmtp export --format wmtp"
        for key, (new, old) in own.items()
        if new != old
    ]
    if problems:
        raise ConfigError(problems)
    if config.lora_dropout:
        _log.info("models.base.lora: the adapter in %s had dropout %s; it goes on without", source, config.lora_dropout)
    for key in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, key):
            _log.info("models.base.lora: the adapter in %s keeps its %s: %s", source, key, pattern)


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


def _fill(base: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = {saved_name(name): tensor for name, tensor in base.named_parameters() if is_adapter_name(name)}
    if problems := misfits(own, state):
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FileError(f"the tensors of the adapter do not fit its base: {'; '.join(problems[:5])}{more}")
    for name, tensor in state.items():
        own[name].data = tensor.detach().clone()


def is_adapter_name(name: str) -> bool:
    """Tell the parameters of an adapter by their name."""
    return any(part.startswith("lora_") for part in name.split("."))


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split adapted heads' state into plain tensors and adapter tensors.

    The former under the names that they have without adapters, the latter by `saved_name`.
    """
    own = {name: tensor for name, tensor in state.items() if not is_adapter_name(name)}
    # experts have an adapter for each of their tensors, one around the other
    plain = {".".join(part for part in name.split(".") if part != "base_layer"): tensor for name, tensor in own.items()}
    return plain, {saved_name(name): tensor for name, tensor in state.items() if is_adapter_name(name)}


def saved_name(name: str) -> str:
    """Name a parameter as PEFT's files do."""
    short = name.replace(f".{_NAME}", "")
    return f"base_model.model.{short.removesuffix('.weight') if 'lora_magnitude_vector' in short else short}"


def fingerprint(base: nn.Module) -> str:
    """Hash a sample of each of a model's tensors.

    The hash is the same in every precision; it is empty for a model on the meta device.
    """
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        if parameter.is_meta:
            return ""
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].to(torch.bfloat16).view(torch.int16).cpu().contiguous()
        digest.update(f"{name} {list(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def merge(base: nn.Module) -> None:
    """Merge an adapter into its weights, and remove PEFT's modules.

    ``base`` is a model or a part of one; sums are in fp32 at least. What 4 bits have left of a
    weight counts: the adapter was learned on that.

    Raises:
        WMTPError: the weights are kept in fp8, which is for training alone.
    """
    check_original(base)
    dequantize_layers(base)
    adapted: list[tuple[str, Any]] = [(name, module) for name, module in base.named_modules() if _is_adapted(module)]
    for _, module in adapted:
        inner = module.get_base_layer()
        dtype = next(inner.parameters()).dtype
        module.to(torch.promote_types(dtype, torch.float32))
        module.merge(safe_merge=True)
        inner.to(dtype)
    for name, module in adapted:
        parent, _, leaf = name.rpartition(".")
        if leaf != "base_layer":  # experts have an adapter for each of their tensors, one around the other
            setattr(base.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.requires_grad_(True)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Disable the adapter inside: compute as the base model does.

    Gradients flow as before.

    Args:
        model: an `MTPModel` or a part of one. Without an adapter nothing changes.
    """
    layers: list[Any] = [module for module in model.modules() if _is_adapted(module)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:  # peft's own switch would change what learns too
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def _is_adapted(module: nn.Module) -> bool:
    if not hasattr(module, "lora_A"):  # spares models without adapters the import
        return False
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)
