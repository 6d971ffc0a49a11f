"""From what a loader gives to a model with heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from attrs import evolve
from torch import Tensor

from wmtp.config.adapter_rules import adapted_heads_problem
from wmtp.config.schema import HeadsConfig, LoraConfig
from wmtp.errors import ConfigError, FileError
from wmtp.models.adapter_names import is_adapter_name, split_state
from wmtp.models.adapter_targets import check_same, check_targets, log_own_settings, make_peft_config
from wmtp.models.adapters import BaseModelName, put_on, quantize_base
from wmtp.models.base import LoadedModel
from wmtp.models.mtp import MTPModel
from wmtp.models.native.found import Native
from wmtp.models.native.search import NONE_FOUND, refusal
from wmtp.models.native.tensors import head_tensors, share_tables

__all__ = ["build_model", "merge_brought", "resolve_heads"]

_log = logging.getLogger("wmtp")


def build_model(
    loaded: LoadedModel,
    heads: HeadsConfig | None,
    seed: int,
    *,
    lora: LoraConfig | None = None,
    name: BaseModelName | None = None,
    quantize: Literal["nf4"] | None = None,
) -> MTPModel:
    """Put heads and, where asked for, an adapter on a loaded model.

    They are those that it brought, its own layers for multi-token prediction, or new ones.

    Args:
        loaded: from a `ModelLoader`.
        heads: the config's ``[models.base.heads]``; None takes the heads that the files hold, or only head 1.
        seed: of new heads, and of a new adapter.
        lora: the config's ``[models.base.lora]``; None takes the adapter that the files hold, if they do.
        name: of the model that a new adapter belongs to.
        quantize: the config's ``models.base.quantize``, which counts with ``lora`` only. The weights are quantized by
            `wmtp.models.adapters.quantize_base`, when they are where they shall be.

    Raises:
        ConfigError: the config wants other heads or another adapter than the model has, or the architecture cannot get any.
        WMTPError: the brought tensors do not fit.
    """
    resolved = resolve_heads(heads, loaded.heads, loaded.native)
    native, untouched = loaded.native, loaded.untouched
    state = None
    if resolved.kind == "native" and native is not None and untouched is not None:
        native = share_tables(native, untouched.tensors, loaded.model)
        # an adapter's folder has them beside the adapter, since it does not have the model
        state = loaded.head_state or head_tensors(native, untouched.tensors, loaded.model)
        kept = {name: tensor for name, tensor in untouched.tensors.items() if name not in native.tensors}
        untouched = evolve(untouched, tensors=kept)
    elif loaded.head_state is not None and resolved.horizon > 1:
        state = _first_heads(loaded.head_state, resolved)
    if native is not None and resolved.kind != "native":
        _say_kept(native, resolved, heads)
    brought, head_adapters = loaded.adapter, None
    if brought is not None and brought.in_heads and state is not None:
        state, head_adapters = split_state(state)
    # the base may be as small as in its files; heads are made in what they learn in
    dtype = None if loaded.stored is None else torch.float32
    model = MTPModel(loaded.model, resolved, head_state=state, seed=seed, native=native, head_dtype=dtype)
    model.stored = {f"base.{name}": own for name, own in (loaded.stored or {}).items()}
    places = {id(parameter): name for name, parameter in model.named_parameters() if name in model.stored}
    model.untouched = untouched
    model.draft_ids = loaded.draft_ids if resolved.horizon > 1 else None
    if brought is not None:
        check_targets(brought.config, loaded.model, brought.folder)
        if lora is not None:
            check_same(brought.config, lora, quantize, loaded.model, brought.folder)
            log_own_settings(brought.config, brought.folder)
        saved = {"base": brought.base, "state": brought.state, "quantize": quantize or brought.quantize}
        try:
            put_on(model, brought.config, seed=seed, in_heads=head_adapters is not None, head_state=head_adapters, **saved)
        except FileError as error:
            raise FileError(f"{brought.folder}: {error}") from error
        except ValueError as error:
            raise FileError(f"{brought.folder}: PEFT refuses the adapter's settings: {error}") from error
    elif lora is not None:
        in_heads = lora.heads == "adapters"
        if in_heads and (problem := adapted_heads_problem(resolved)) is not None:
            raise ConfigError(f"models.base.lora.heads: {problem}")
        put_on(model, make_peft_config(loaded.model, lora), seed=seed, base=name, quantize=quantize, in_heads=in_heads)
    if model.adapter is not None and model.stored:
        # peft puts maps into modules of its own, and makes new adapters in their type
        now = {places[id(parameter)]: name for name, parameter in model.named_parameters() if id(parameter) in places}
        model.stored = {now[name]: own for name, own in model.stored.items() if name in now}
        for place, parameter in model.named_parameters():
            if is_adapter_name(place):
                parameter.data = parameter.data.float()
    return model


def _say_kept(native: Native, resolved: HeadsConfig, wanted: HeadsConfig | None) -> None:
    """Log why the model's own multi-token layers are not opened.

    It is a warning where the config does not choose heads.
    """
    about = "the model's own layers for multi-token prediction"
    if native.problem is not None:
        level = logging.WARNING if wanted is None else logging.INFO
        _log.log(level, "%s are not opened, and stay as they are: %s", about, native.problem.text)
        return
    reason = "horizon = 1" if resolved.horizon == 1 else f"the heads are of kind '{resolved.kind}'"
    _log.info("%s stay as they are: %s", about, reason)


def merge_brought(model: MTPModel) -> None:
    """Merge the adapter that a model brought.

    All of the model can learn then.
    """
    if model.adapter is None:
        return
    _log.info("the adapter that the model brings is merged into it, all of which learns")
    quantize_base(model)  # what the adapter was learned on
    model.merge_adapter()


def resolve_heads(wanted: HeadsConfig | None, brought: HeadsConfig | None, native: Native | None = None) -> HeadsConfig:
    """Reconcile the heads of the config with those of the model.

    Args:
        wanted: by the config.
        brought: that WMTP, or Meta, saved with the model.
        native: the model's own layers for multi-token prediction.

    Raises:
        ConfigError: they contradict each other.
    """
    own = native is not None and native.problem is None
    if wanted is None:
        if brought is None and native is not None and own:
            return HeadsConfig(kind="native", horizon=native.modules + 1)
        wanted = brought or HeadsConfig(horizon=1)
    elif brought is not None and brought.horizon > 1 and wanted.horizon > 1:
        wanted = _agreed(wanted, brought)
    if wanted.horizon == 1:
        return evolve(wanted, kind=wanted.kind or "block")
    kind = wanted.kind or ("native" if native is not None else "block")
    if kind == "native" and not own:
        _refuse_native(wanted, native)
    if kind == "native" and wanted.init != HeadsConfig().init:
        raise ConfigError(
            f"models.base.heads.init: '{wanted.init}' has no effect: the heads are the model's own layers; remove it"
        )
    return evolve(wanted, kind=kind)


def _refuse_native(wanted: HeadsConfig, native: Native | None) -> None:
    if native is None or native.problem is None:
        raise ConfigError(f"models.base.heads.kind: {NONE_FOUND}")
    key = "models.base.heads.kind" if wanted.kind == "native" else "models.base.heads"
    raise ConfigError(f"{key}: {refusal(native.problem)}")


def _agreed(wanted: HeadsConfig, brought: HeadsConfig) -> HeadsConfig:
    """Compare the config with the heads that a model brings.

    Raises:
        ConfigError: they contradict each other.
    """
    wanted = evolve(wanted, kind=wanted.kind or brought.kind, layout=wanted.layout or brought.layout)
    if wanted.kind != brought.kind:
        raise ConfigError(
            f"models.base.heads.kind: the config says '{wanted.kind}', but the model brings heads of kind '{brought.kind}'; "
            f'write kind = "{brought.kind}"'
        )
    if wanted.layout != brought.layout:
        raise ConfigError(
            f"models.base.heads.layout: the config says '{wanted.layout}', but the heads that the model brings were trained as "
            f"'{brought.layout}'; write layout = \"{brought.layout}\""
        )
    if wanted.horizon > brought.horizon and wanted.kind not in ("shared", "native"):
        raise ConfigError(
            f"models.base.heads.horizon: the config says {wanted.horizon}, but the model brings heads for "
            f"{brought.horizon} tokens; write at most {brought.horizon}"
        )
    if wanted.init != HeadsConfig().init:
        raise ConfigError(
            f"models.base.heads.init: '{wanted.init}' has no effect: the model keeps the heads that it brings; remove it"
        )
    if wanted.horizon < brought.horizon:
        _log.info("the model brings %d heads; the first %d are used", brought.horizon, wanted.horizon)
    return wanted


def _first_heads(state: Mapping[str, Tensor], heads: HeadsConfig) -> dict[str, Tensor]:
    """Select the tensors of heads 2..H.

    A smaller horizon drops the model's last heads.
    """
    if heads.kind == "shared":
        return dict(state)
    first = {str(index) for index in range(heads.horizon - 1)}
    return {name: tensor for name, tensor in state.items() if name.split(".")[0] in first or not name[0].isdigit()}
