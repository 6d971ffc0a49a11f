"""Builders of a run's optimizer and of the built-in optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wmtp.errors import PluginError
from wmtp.plugins.built import built
from wmtp.plugins.provenance import provenance

if TYPE_CHECKING:
    from wmtp.config.schema import Config
    from wmtp.models.mtp import MTPModel
    from wmtp.optim.config import AdamW, Muon
    from wmtp.optim.master_weights import MasterWeights

__all__ = ["build_adamw", "build_muon", "build_optimizer", "change_learning_rate", "decay_groups"]

NamedParameters = Sequence[tuple[str, nn.Parameter]]


def build_optimizer(
    config: Config,
    model: MTPModel,
    parameters: list[tuple[str, nn.Parameter]],
    modules: Mapping[str, nn.Module],
    rates: Mapping[str, float],
    master_weights: MasterWeights | None,
) -> torch.optim.Optimizer:
    """Build the optimizer of all trainable parameters, with their learning rates."""
    of_heads = list(model.extra_heads.parameters())
    if master_weights is not None:
        names, plain = zip(*parameters, strict=True)
        parameters = list(zip(names, master_weights.replace(plain), strict=True))
        of_heads = master_weights.replace(of_heads)
    optimizer: torch.optim.Optimizer = built(config.optimizer, "optimizers", parameters)
    name = provenance(config.optimizer, "optimizer")
    _check_complete(optimizer, parameters, name)
    _check_step(optimizer, name)
    if master_weights is not None:
        optimizer = master_weights.take_over(optimizer)
    # groups of their own, however many ranks there are: a fused step takes parameters of one kind, and these are never divided
    change_learning_rate(optimizer, [p for module in modules.values() for p in module.parameters()], lambda lr: lr)
    if model.heads.lr_factor != 1.0:
        change_learning_rate(optimizer, of_heads, lambda lr: lr * model.heads.lr_factor)
    for module, rate in rates.items():
        change_learning_rate(optimizer, modules[module].parameters(), lambda _, rate=rate: rate)
    return optimizer


def _check_complete(optimizer: torch.optim.Optimizer, parameters: list[tuple[str, nn.Parameter]], name: str) -> None:
    """Refuse an optimizer that misses parameters or has others.

    Some would silently never learn.
    """
    given = {id(parameter): of for of, parameter in parameters}
    taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [of for key, of in given.items() if key not in taken]
    if left_out:
        some = ", ".join(left_out[:3]) + (" …" if len(left_out) > 3 else "")
        raise PluginError(
            f"{name}: build left out {len(left_out)} of {len(given)} parameters, which would never learn: {some}; give its"
            " groups all of them, and freeze by a stage of the trainer"
        )
    if foreign := taken - given.keys():
        raise PluginError(f"{name}: build gave it {len(foreign)} parameters that are not among those it was called with")


def _check_step(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuse an optimizer that computes the loss itself, as LBFGS."""
    try:
        inspect.signature(optimizer.step).bind()
    except TypeError:
        raise PluginError(
            f"{name}: its step() needs an argument, as a closure that computes the loss again; a run computes it once a step: "
            "build an optimizer whose step() needs none"
        ) from None


def build_adamw(config: AdamW, parameters: NamedParameters) -> torch.optim.Optimizer:
    """AdamW with one group that decays and one that does not."""
    return torch.optim.AdamW(
        decay_groups(parameters, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for _, p in parameters),
    )


def decay_groups(parameters: NamedParameters, weight_decay: float) -> list[dict[str, Any]]:
    """Group parameters into matrices, which decay, and vectors, which do not."""
    decayed = [p for _, p in parameters if p.ndim >= 2]
    plain = [p for _, p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_muon(config: Muon, parameters: NamedParameters) -> torch.optim.Optimizer:
    """Build Muon for the layers' matrices and AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in parameters:
        # an embedding or unembedding is a table of vectors, not a map between two spaces of features
        table = any(part in name for part in ("embed", "wte", "wpe", "lm_head", "unembedding"))
        (matrices if parameter.ndim == 2 and not table else rest).append((name, parameter))
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            torch.optim.Muon(
                [p for _, p in matrices],
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        parts.append(build_adamw(config, rest))  # type: ignore[arg-type]
    return _Joined(parts)


def change_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], change: Callable[[float], float]
) -> None:
    """Move parameters to groups with a changed learning rate."""
    chosen = {id(parameter) for parameter in parameters}
    for part in optimizer.parts if isinstance(optimizer, _Joined) else [optimizer]:
        for group in list(part.param_groups):
            own = [p for p in group["params"] if id(p) in chosen]
            rest = [p for p in group["params"] if id(p) not in chosen]
            if own and rest:
                group["params"] = rest
                part.param_groups.append({**group, "params": own, "lr": change(group["lr"])})
            elif own:
                group["lr"] = change(group["lr"])
    if isinstance(optimizer, _Joined):
        optimizer.collect_groups()


class _Joined(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, that step together."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.collect_groups()

    def collect_groups(self) -> None:
        """Share the parts' groups, so that learning rates set here count."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every part."""
        for part in self.parts:
            part.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear every part's gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Collect the parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.collect_groups()
