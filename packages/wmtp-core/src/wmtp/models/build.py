"""From what a loader gives to a model with heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from wmtp.config.schema import HeadsConfig
from wmtp.errors import ConfigError
from wmtp.models.base import LoadedModel
from wmtp.models.mtp import MTPModel

__all__ = ["build_model", "resolve_heads"]

_log = logging.getLogger("wmtp")


def build_model(loaded: LoadedModel, heads: HeadsConfig | None, seed: int) -> MTPModel:
    """Put heads on a loaded model: those that it brought, or new ones.

    Args:
        loaded: from a `ModelLoader`.
        heads: the config's ``[models.base.heads]``; None takes the heads that the files hold, or only head 1.
        seed: of new heads.

    Raises:
        ConfigError: the config wants other heads than the model has, or the architecture cannot get any.
        WMTPError: the brought tensors do not fit.
    """
    resolved = resolve_heads(heads, loaded.heads)
    state = None
    if loaded.head_state is not None and resolved.horizon > 1:
        state = _first_heads(loaded.head_state, resolved)
    model = MTPModel(loaded.model, resolved, head_state=state, seed=seed)
    model.untouched = loaded.untouched
    return model


def resolve_heads(wanted: HeadsConfig | None, brought: HeadsConfig | None) -> HeadsConfig:
    """Reconcile the heads of the config with those of the model.

    Raises:
        ConfigError: they contradict each other.
    """
    if wanted is None:
        return brought or HeadsConfig(horizon=1)
    if brought is None or brought.horizon == 1 or wanted.horizon == 1:
        return wanted
    if wanted.kind != brought.kind:
        raise ConfigError(
            f"models.base.heads.kind: the config says '{wanted.kind}', but the model brings heads of kind '{brought.kind}'; "
            f'write kind = "{brought.kind}"'
        )
    if wanted.horizon > brought.horizon and wanted.kind != "shared":
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
    """Select the tensors of heads 2..H; a smaller horizon drops the model's last heads."""
    if heads.kind == "shared":
        return dict(state)
    first = {str(index) for index in range(heads.horizon - 1)}
    return {name: tensor for name, tensor in state.items() if name.split(".")[0] in first or not name[0].isdigit()}
