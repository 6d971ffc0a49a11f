"""Fp32 master weights of bf16 parameters (Micikevicius et al., arXiv 1710.03740, §3.1)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from wmtp.loss.cross_entropy import implementation
from wmtp.optim.master_adamw import MasterAdamW

__all__ = ["MasterWeights"]


class MasterWeights:
    """Fp32 copies of a model's parameters, for the optimizer to update.

    bf16 has 8 significant bits: an update smaller than 1/256 of a weight, as nearly all of a fine-tuning are, would be lost. So
    the optimizer works on the copies. A backward pass adds each gradient to the copy's own, in fp32, the sum over micro-batches
    too, and frees the bf16 one; after every step of the optimizer the copies are rounded into the parameters.

    On a GPU all of that is one pass where the optimizer is torch's AdamW (`wmtp.optim.master_adamw`), and a gradient that no
    other is added to stays as it is.

    Args:
        model: whose fp32 parameters become bf16. Buffers (rotary frequencies, say) stay as they are.
        fixed: parameters that never learn, and so have no copy: they are in bf16 already.
        one_pass: whether this process alone has the gradients; those of several are added up in fp32.
    """

    def __init__(self, model: nn.Module, *, fixed: Iterable[nn.Parameter] = (), one_pass: bool = True) -> None:
        self._one_pass = one_pass
        self._keeps_half = False
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        never = {id(parameter) for parameter in fixed}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in never:
                    continue
                self._places.append((module, name, parameter))  # a tied parameter has several places and one copy
                if parameter not in self._masters:
                    self._masters[parameter] = nn.Parameter(parameter.detach().float().contiguous())
        # a parameter must not keep its copies alive: Python's garbage collector cannot see into torch's hooks
        own = weakref.ref(self)

        def take_gradient(parameter: Tensor) -> None:
            if (masters := own()) is not None:
                masters._take_gradient(parameter)

        for parameter, master in self._masters.items():
            parameter.grad = None
            parameter.data = master.detach().to(torch.bfloat16)
            parameter.register_post_accumulate_grad_hook(take_gradient)

    def replace(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Replace parameters by their fp32 copies; parameters without a copy stay."""
        return [self._masters.get(parameter, parameter) for parameter in parameters]

    def take_over(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return an optimizer over the copies that also updates the parameters.

        Its results are rounded into them after each step.
        """
        if self._one_pass and _is_plain_adamw(optimizer) and _runs_triton(self._masters):
            self._keeps_half = True
            for master in self._masters.values():
                master.grad_dtype = None  # any
            return MasterAdamW(optimizer, {master: parameter for parameter, master in self._masters.items()})
        optimizer.register_step_post_hook(lambda *_: self.publish())
        return optimizer

    @torch.no_grad()
    def publish(self) -> None:
        """Round the copies into the parameters."""
        torch._foreach_copy_(list(self._masters), list(self._masters.values()))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the fp32 copies into the model, to save or load.

        They are published afterwards.
        """
        for module, name, parameter in self._places:
            module._parameters[name] = self._masters[parameter]
        try:
            yield
        finally:
            for module, name, parameter in self._places:
                module._parameters[name] = parameter
            self.publish()

    @torch.no_grad()
    def _take_gradient(self, parameter: Tensor) -> None:
        master, gradient = self._masters[cast(nn.Parameter, parameter)], parameter.grad
        if gradient is None:  # torch also calls the hook of a parameter that gets no gradient
            return
        if master.grad is None:
            master.grad = gradient if self._keeps_half else gradient.to(master.dtype)
        else:
            master.grad = master.grad.to(master.dtype).add_(gradient)
        parameter.grad = None


def _runs_triton(parameters: Iterable[Tensor]) -> bool:
    return all(implementation(parameter.device, torch.float32) == "fused" for parameter in parameters)


def _is_plain_adamw(optimizer: torch.optim.Optimizer) -> TypeGuard[torch.optim.AdamW]:
    """Tell whether an optimizer is torch's own, new AdamW over fp32.

    It must have neither hooks nor rare options.
    """
    if type(optimizer) is not torch.optim.AdamW or optimizer.state:
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    return all(
        not (group["amsgrad"] or group["maximize"] or group["differentiable"])
        and not isinstance(group["lr"], Tensor)
        and all(parameter.dtype == torch.float32 for parameter in group["params"])
        for group in optimizer.param_groups
    )
