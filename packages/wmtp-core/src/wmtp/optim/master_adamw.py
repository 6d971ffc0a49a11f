"""Fused AdamW over the fp32 copies of bf16 parameters, on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MasterAdamW"]

_BLOCK = 2048


class MasterAdamW(torch.optim.AdamW):
    """Fused AdamW over fp32 master copies.

    It takes raw gradients, clips, and publishes in one pass. An optimizer of torch wants gradients in fp32, and clipping and
    publishing are passes of their own: 48 bytes read or written a parameter and step in place of 28
    (`wmtp.optim.master_weights`). State and groups are those of torch's AdamW.

    Args:
        optimizer: its groups are taken over; it must not have stepped yet.
        parameters: copy → the bf16 parameter that it is rounded into. Other parameters of the groups have none.
    """

    def __init__(self, optimizer: torch.optim.AdamW, parameters: Mapping[nn.Parameter, nn.Parameter]) -> None:
        from wmtp.optim.adamw_kernel import adamw_kernel  # imports Triton

        super().__init__(optimizer.param_groups)
        self._kernel: Any = adamw_kernel  # the decorator of Triton hides what it returns
        self._parameters = parameters
        self._clip: Tensor | None = None

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Have the next step clip gradients to ``max_norm``.

        It scales them down where their ``norm`` (a scalar) is larger.
        """
        # as torch.nn.utils.clip_grads_with_norm_ does
        self._clip = (max_norm / (norm.float() + 1e-6)).clamp(max=1.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Raises:
            TypeError: there is a closure.
        """
        if closure is not None:
            raise TypeError("MasterAdamW takes no closure: its gradients are there before it steps")
        for group in self.param_groups:
            learned = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not learned:
                continue
            states = [self._state_of(parameter) for parameter in learned]
            torch._foreach_add_([state["step"] for state in states], 1.0)
            # in fp64 and on the device: 1 − β₂ᵗ loses digits in fp32, and the host must not wait for t
            steps = torch.stack([state["step"] for state in states]).double()
            beta1, beta2 = group["betas"]
            corrections = torch.stack([1.0 - beta1**steps, 1.0 - beta2**steps], dim=1).float()
            clip = corrections.new_ones(()) if self._clip is None else self._clip
            for parameter, state, correction in zip(learned, states, corrections.unbind(), strict=True):
                self._update(parameter, state, correction, clip, group)
        self._clip = None

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        elif state["step"].device != parameter.device:  # as torch's AdamW reads it back if it is not a fused one
            state["step"] = state["step"].to(parameter.device)
        return state

    def _update(
        self, master: nn.Parameter, state: Mapping[str, Tensor], correction: Tensor, clip: Tensor, group: Mapping[str, Any]
    ) -> None:
        published = self._parameters.get(master, master)
        gradient = master.grad
        assert gradient is not None, "step() leaves out parameters without gradient"
        if gradient.stride() != master.stride():  # the kernel goes through memory, not through indices
            gradient = torch.empty_like(master, dtype=gradient.dtype).copy_(gradient)
        beta1, beta2 = group["betas"]
        self._kernel[(-(-master.numel() // _BLOCK),)](
            master,
            published,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            correction,
            clip,
            float(group["lr"]),
            1.0 - float(group["lr"]) * group["weight_decay"],
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            group["eps"],
            master.numel(),
            PUBLISH=published is not master,
            BLOCK=_BLOCK,
            num_warps=8,
        )
